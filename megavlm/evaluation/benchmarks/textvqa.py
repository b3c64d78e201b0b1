"""TextVQA: questions about text in photographs, each answered by ten people.

Format: textvqa.org, ``TextVQA_0.5.1_val.json``: ``data`` with ``question_id``, ``image_id``, ``question``, ``answers``;
images are ``train_images/IMAGE_ID.jpg``, for validation too. The test split has no answers.
"""

from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import (
    SINGLE_WORD_PHRASE_OR_NUMBER,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
)
from megavlm.evaluation.benchmarks.reading import find_image, read_object
from megavlm.evaluation.metrics import TextVQAAccuracy
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn


def read_textvqa(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file.

    Raises:
        ValueError: an entry is malformed.
    """
    for entry in read_object(files.data).entries("data"):
        name = f"{entry.text('image_id')}.jpg"
        image = find_image(files.images, name, f"train_images/{name}")
        prompt = with_instruction(entry.text("question"), instruction)
        yield Question(entry.text("question_id"), Conversation((user_turn(prompt, [image]),)), entry.texts("answers"))


TEXTVQA = Benchmark(read_textvqa, TextVQAAccuracy(), SINGLE_WORD_PHRASE_OR_NUMBER, max_new_tokens=10)
