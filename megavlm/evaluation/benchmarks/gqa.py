"""GQA: questions made from scene graphs.

Format: cs.stanford.edu/people/dorarad/gqa, ``testdev_balanced_questions.json``: one object, question id -> ``imageId``,
``question``, ``answer``, ``types`` (its ``structural`` kind is the category); images are ``images/IMAGEID.jpg``.
"""

from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import (
    SINGLE_WORD_OR_PHRASE,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
)
from megavlm.evaluation.benchmarks.reading import Entry, find_image, read_object
from megavlm.evaluation.metrics import GQAAccuracy
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn


def read_gqa(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file.

    Raises:
        ValueError: an entry is malformed.
    """
    data = read_object(files.data)
    for key, value in data.value.items():
        entry = Entry(value, f"{data.where}[{key}]")
        name = f"{entry.text('imageId')}.jpg"
        image = find_image(files.images, name, f"images/{name}")
        prompt = with_instruction(entry.text("question"), instruction)
        yield Question(
            key, Conversation((user_turn(prompt, [image]),)), entry.texts("answer"), category=_category(entry)
        )


def _category(entry: Entry) -> str:
    types = Entry(entry.value["types"], f"{entry.where}.types") if entry.has("types") else None
    return types.text("structural") if types is not None and types.has("structural") else ""


GQA = Benchmark(read_gqa, GQAAccuracy(), SINGLE_WORD_OR_PHRASE, max_new_tokens=10)
