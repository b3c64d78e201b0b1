"""ChartQA: questions about charts, numbers within 5 % are right.

Format: vis-nlp/ChartQA, ``test_human.json`` and ``test_augmented.json``: a list of ``imgname``, ``query``, ``label``;
images are ``png/IMGNAME``. The published figure is the mean of the two files, which have 1,250 questions each: evaluate
each by itself.
"""

from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import (
    SINGLE_WORD_OR_PHRASE,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
)
from megavlm.evaluation.benchmarks.reading import find_image, read_rows
from megavlm.evaluation.metrics import RelaxedAccuracy
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn


def read_chartqa(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file. Its questions have no names; their places in the file are their keys.

    Raises:
        ValueError: an entry is malformed.
    """
    for number, entry in enumerate(read_rows(files.data)):
        name = entry.text("imgname")
        image = find_image(files.images, name, f"png/{name}")
        prompt = with_instruction(entry.text("query"), instruction)
        yield Question(
            f"{files.data.name}[{number}]", Conversation((user_turn(prompt, [image]),)), entry.texts("label")
        )


CHARTQA = Benchmark(read_chartqa, RelaxedAccuracy(), SINGLE_WORD_OR_PHRASE, max_new_tokens=100)
