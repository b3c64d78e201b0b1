"""OCRBench: reading text in images, 1,000 questions of 29 datasets.

Format: Yuliang-Liu/MultimodalOCR, ``OCRBench.json``: a list of ``dataset_name``, ``id``, ``image_path``, ``question``,
``answers`` (one or several), ``type``. Its questions carry their own instructions, so that none is added.
"""

from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import Benchmark, BenchmarkFiles, with_instruction
from megavlm.evaluation.benchmarks.reading import read_rows
from megavlm.evaluation.metrics import OCRBenchAccuracy
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn


def read_ocrbench(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file. Its ids are not unique; the questions' places in the file are their keys.

    Raises:
        ValueError: an entry is malformed.
    """
    for number, entry in enumerate(read_rows(files.data)):
        prompt = with_instruction(entry.text("question"), instruction)
        yield Question(
            f"{files.data.name}[{number}]",
            Conversation((user_turn(prompt, [str(files.images / entry.text("image_path"))]),)),
            entry.texts("answers"),
            category=entry.text("type"),
        )


OCRBENCH = Benchmark(read_ocrbench, OCRBenchAccuracy(), "", max_new_tokens=100)
