"""MMMU: college exam questions with up to seven images.

Format: MMMU/MMMU on Hugging Face, its rows saved one a line (or as a JSON list): ``id``
(``validation_Accounting_1``: the subject is the category), ``question``, ``options`` (a list, or its Python text as in
the parquet files), ``answer`` (a letter, or several), ``image_1`` to ``image_7`` (a path, a ``data:`` URI, or an object
with ``path``; null where there is none). Images are read where ``<image 1>`` stands in question or options, which is
Megatron-LM's ``multi_image``; a row that names none gets its images before the text. NVLM's own figures use one image.

Open questions (``options`` empty; 53 of the 900 of validation) end in an instruction of their own and may have several
right answers, as a list or the text of one.
"""

import ast
import re
from collections.abc import Iterator

from megavlm.data import Conversation, ImageRef, Message
from megavlm.evaluation.benchmarks.benchmark import (
    OPTION_LETTER,
    SINGLE_WORD_OR_PHRASE,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
    with_options,
)
from megavlm.evaluation.benchmarks.reading import Entry, read_rows
from megavlm.evaluation.metrics import MMMUAccuracy
from megavlm.evaluation.question import Question

_PLACEHOLDER = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[a-z]+_(.+)_\d+")
_MOST_IMAGES = 7


def read_mmmu(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file. A split (``validation``, ``dev``, ``test``) takes the rows whose id begins with it.

    Raises:
        ValueError: an entry is malformed, or names an image that it does not have.
    """
    for entry in read_rows(files.data):
        key = entry.text("id")
        if files.split and not key.startswith(f"{files.split}_"):
            continue
        options = _options(entry)
        is_usual = not options and instruction == OPTION_LETTER
        text = with_options(entry.text("question"), options)
        text = with_instruction(text, SINGLE_WORD_OR_PHRASE if is_usual else instruction)
        subject = _SUBJECT.fullmatch(key)
        yield Question(
            key,
            Conversation((Message("user", _parts(entry, text, files)),)),
            _answers(entry) if not options else entry.texts("answer"),
            options,
            subject.group(1) if subject else "",
        )


def _options(entry: Entry) -> tuple[str, ...]:
    value = entry.raw("options")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            entry.fail("options", "is neither a list nor the text of one. Mend the row.")
    if not isinstance(value, list | tuple):
        entry.fail("options", "is not a list of texts. Mend the row.")
    return tuple(map(str, value))


def _answers(entry: Entry) -> tuple[str, ...]:
    """The right answers of an open question."""
    texts = entry.texts("answer")
    if len(texts) > 1 or not texts[0].strip().startswith("["):
        return texts
    try:
        value = ast.literal_eval(texts[0].strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return texts  # an interval, "[0, 1)"
    return tuple(map(str, value)) if isinstance(value, list) and value else texts


def _parts(entry: Entry, text: str, files: BenchmarkFiles) -> tuple[str | ImageRef, ...]:
    """The text with its images where they are named."""
    pieces = _PLACEHOLDER.split(text)  # text, number, text, number, ... text
    if len(pieces) == 1:
        numbers = [number for number in range(1, _MOST_IMAGES + 1) if entry.has(f"image_{number}")]
        pieces = [piece for number in numbers for piece in ("", str(number))] + ["\n" * bool(numbers) + text]
    parts = [_image(entry, f"image_{piece}", files) if place % 2 else piece for place, piece in enumerate(pieces)]
    return tuple(part for part in parts if part != "")


def _image(entry: Entry, key: str, files: BenchmarkFiles) -> ImageRef:
    value = entry.raw(key)
    name = Entry(value, f"{entry.where}.{key}").text("path") if isinstance(value, dict) else entry.text(key)
    return ImageRef(name if name.startswith("data:") else str(files.images / name))


MMMU = Benchmark(read_mmmu, MMMUAccuracy(), OPTION_LETTER, max_new_tokens=16, takes_split=True)
