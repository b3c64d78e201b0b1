"""DocVQA and InfographicVQA: questions about scanned pages and infographics, with every accepted spelling.

Format: rrc.cvc.uab.es (task 17), ``val_v1.0.json`` and ``infographicsVQA_val_v1.0_withQT.json``: ``data`` with
``questionId``, ``question``, ``answers``, and the image as ``image`` (``documents/xnbl0037_1.png``) or
``image_local_name`` (``20471.jpeg``). ``question_types`` or ``answer_type`` is the category; several are joined. The
test splits have no answers.
"""

from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import (
    SINGLE_WORD_PHRASE_OR_NUMBER,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
)
from megavlm.evaluation.benchmarks.reading import Entry, find_image, read_object
from megavlm.evaluation.metrics import ANLS
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn


def read_docvqa(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file of either.

    Raises:
        ValueError: an entry is malformed.
    """
    for entry in read_object(files.data).entries("data"):
        name = entry.text("image_local_name" if entry.has("image_local_name") else "image")
        image = find_image(files.images, name, name.rpartition("/")[2])
        prompt = with_instruction(entry.text("question"), instruction)
        yield Question(
            entry.text("questionId"),
            Conversation((user_turn(prompt, [image]),)),
            entry.texts("answers"),
            category=_category(entry),
        )


def _category(entry: Entry) -> str:
    for key in ("question_types", "answer_type"):
        if entry.has(key) and entry.value[key] != []:
            return ", ".join(sorted(entry.texts(key)))
    return ""


DOCVQA = Benchmark(read_docvqa, ANLS(), SINGLE_WORD_PHRASE_OR_NUMBER, max_new_tokens=100)
INFOGRAPHICVQA = Benchmark(read_docvqa, ANLS(), SINGLE_WORD_PHRASE_OR_NUMBER, max_new_tokens=100)
