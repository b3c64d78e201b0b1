"""VQAv2: questions about COCO photographs, each answered by ten people.

Format: visualqa.org, ``v2_OpenEnded_mscoco_val2014_questions.json`` (``questions`` with ``question_id``, ``image_id``,
``question``; ``data_subtype`` is part of the images' names) and ``v2_mscoco_val2014_annotations.json``
(``annotations`` with ``question_id``, ``answer_type``, ``answers`` of ``answer``), as GT-Vision-Lab/VQA reads them.
"""

from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import (
    SINGLE_WORD_OR_PHRASE,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
)
from megavlm.evaluation.benchmarks.coco import coco_image, coco_image_folder
from megavlm.evaluation.benchmarks.reading import read_object
from megavlm.evaluation.metrics import VQAAccuracy
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn


def read_vqav2(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read both files.

    Raises:
        ValueError: an entry is malformed, or a question has no annotation.
    """
    assert files.annotations is not None
    data = read_object(files.data)
    split = files.split or data.text("data_subtype")
    folder = coco_image_folder(files.images, split)
    annotations = {entry.text("question_id"): entry for entry in read_object(files.annotations).entries("annotations")}
    for entry in data.entries("questions"):
        key = entry.text("question_id")
        if key not in annotations:
            entry.fail("question_id", f"has no annotation in {files.annotations}. Give the file of the same split.")
        annotation = annotations[key]
        prompt = with_instruction(entry.text("question"), instruction)
        yield Question(
            key,
            Conversation((user_turn(prompt, [coco_image(folder, split, entry.number("image_id"))]),)),
            tuple(answer.text("answer") for answer in annotation.entries("answers")),
            category=annotation.text("answer_type") if annotation.has("answer_type") else "",
        )


VQAV2 = Benchmark(
    read_vqav2, VQAAccuracy(), SINGLE_WORD_OR_PHRASE, max_new_tokens=10, takes_annotations=True, takes_split=True
)
