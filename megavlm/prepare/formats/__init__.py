"""The formats that can be prepared. The dict of them, and how a source's format is found."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megavlm.prepare.formats import html, image_folder, text
from megavlm.prepare.formats.html import HtmlFormat
from megavlm.prepare.formats.image_folder import ImageFolderFormat
from megavlm.prepare.formats.rows import RowsFormat, json_files, mmc4_document
from megavlm.prepare.formats.text import TextFormat
from megavlm.prepare.item import Format, FormatOptions

FORMATS: dict[str, Callable[[Path, FormatOptions], Format]] = {
    "llava": partial(RowsFormat, needed_key="conversations"),
    "sharegpt": partial(RowsFormat, needed_key="conversations"),
    "openai": partial(RowsFormat, needed_key="messages"),
    "rows": RowsFormat,
    "imagefolder": ImageFolderFormat,
    "html": HtmlFormat,
    "mmc4": partial(RowsFormat, needed_key="text_list", reshape=mmc4_document),
    "obelics": partial(RowsFormat, needed_key="texts"),
    "text": TextFormat,
}
"""By the name that the command line has for it. ``rows`` takes rows of every shape, mixed, and is what ``auto`` chooses
for JSON; the others refuse rows of another shape."""

_KEY_OF_MMC4 = "text_list"
_PEEKED_BYTES = 1 << 20


def find_format(source: Path) -> str:
    """Say which of :data:`FORMATS` a source has.

    Raises:
        ValueError: it is not there, or could be several things.
    """
    if source.is_dir():
        return _format_of_folder(source)
    if not source.is_file():
        raise ValueError(f"source={source}: is no file and no folder. Check the path.")
    suffix = source.suffix.lower()
    if suffix in html.SUFFIXES:
        return "html"
    if suffix in text.SUFFIXES:
        return "text"
    if suffix in (".json", ".jsonl"):
        return _format_of_rows(source)
    raise ValueError(
        f"source={source}: the ending {suffix!r} says nothing. Name the format with --format={'|'.join(FORMATS)}."
    )


def _format_of_folder(folder: Path) -> str:
    if next(folder.rglob(image_folder.METADATA_NAME), None) is not None:
        return "imagefolder"
    found = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    if found.intersection(html.SUFFIXES):
        return "html"
    if found.intersection((".json", ".jsonl")):
        kinds = {_format_of_rows(path) for path in json_files(folder)}
        return kinds.pop() if len(kinds) == 1 else "rows"
    if found.intersection(image_folder.SUFFIXES):
        return "imagefolder"
    if found.intersection(text.SUFFIXES):
        return "text"
    listed = ", ".join(sorted(suffix or "none" for suffix in found)) or "no files"
    raise ValueError(f"source={folder}: holds nothing that is known ({listed}). Name the format with --format.")


def _format_of_rows(path: Path) -> str:
    """``mmc4`` by the keys of the first row that can be read; otherwise ``rows``, whose shapes may be mixed."""
    try:
        with open(path, "rb") as file:
            start = file.read(_PEEKED_BYTES)
    except OSError as error:
        raise ValueError(f"source={path}: cannot be read ({error.strerror}). Check the path.") from None
    text = start.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    pieces = [text.removeprefix("[").lstrip()] if path.suffix.lower() == ".json" else text.splitlines()
    row = next(filter(None, map(_object, pieces)), {})
    return "mmc4" if _KEY_OF_MMC4 in row else "rows"


def _object(text: str) -> Mapping[str, Any]:
    """The object that a text begins with; an empty one if it begins with something else."""
    try:
        content, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


__all__ = ["FORMATS", "find_format"]
