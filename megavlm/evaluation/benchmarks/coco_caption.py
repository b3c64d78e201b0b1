"""COCO captions: one sentence for a photograph, compared with those of five people.

Format: cocodataset.org, ``captions_val2014.json``, or the Karpathy split's ``coco_karpathy_test_gt.json``: ``images``
with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and ``caption``. Where images have no ``file_name``,
``split`` (``val2014``) makes it. Images without a caption are left out and counted.
"""

from collections import defaultdict
from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import Benchmark, BenchmarkFiles
from megavlm.evaluation.benchmarks.coco import coco_image, coco_image_folder
from megavlm.evaluation.benchmarks.reading import Entry, read_object
from megavlm.evaluation.metrics import CIDEr
from megavlm.evaluation.question import LeftOut, Question
from megavlm.inference.answer import user_turn

INSTRUCTION = "Give a brief description of this image in one sentence."
"""Megatron-LM's, examples/multimodal/run_text_generation.py. It is the whole prompt."""


def read_coco_caption(files: BenchmarkFiles, instruction: str) -> Iterator[Question | LeftOut]:
    """Read the file.

    Raises:
        ValueError: an entry is malformed, a caption is of an image that is not listed, or there is no instruction.
    """
    if not instruction:
        raise ValueError("--prompt-suffix='': the instruction is all that is asked of captions. Give one.")
    data = read_object(files.data)
    images = {entry.text("id"): entry for entry in data.entries("images")}
    captions = defaultdict(list)
    for entry in data.entries("annotations"):
        if entry.text("image_id") not in images:
            entry.fail("image_id", f"is none of the {len(images)} images of the file. Mend the file.")
        captions[entry.text("image_id")].append(entry.text("caption"))
    for key, image in images.items():
        if key not in captions:
            yield LeftOut(key, "image without a caption")
            continue
        yield Question(key, Conversation((user_turn(instruction, [_image(image, files)]),)), tuple(captions[key]))


def _image(entry: Entry, files: BenchmarkFiles) -> str:
    if entry.has("file_name"):
        name = entry.text("file_name")
        folder = coco_image_folder(files.images, files.split) if files.split else files.images
        return str(folder / name)
    if files.split is None:
        raise ValueError(f"{entry.where}.file_name: is missing. Give --split (val2014), which names COCO's images.")
    return coco_image(coco_image_folder(files.images, files.split), files.split, entry.number("id"))


COCO_CAPTION = Benchmark(read_coco_caption, CIDEr(), INSTRUCTION, max_new_tokens=30, takes_split=True)
