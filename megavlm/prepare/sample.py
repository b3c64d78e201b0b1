"""One row as the files of a sample: its JSON, and its images as they are."""

import base64
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megavlm.data.conversation import parse_conversation
from megavlm.data.image import DEFAULT_MAX_PIXELS, ImageError, load_image
from megavlm.data.row_shape import shape_of
from megavlm.prepare.item import Row, RowError

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
_PART_KEYS = ("image", "image_url", "path", "url")
_ORIGIN = "origin"


@dataclass(frozen=True)
class ImageLimits:
    """Which images are taken."""

    max_image_pixels: int = DEFAULT_MAX_PIXELS
    """Larger ones are refused before they are unpacked."""
    max_image_bytes: int = 64 << 20
    """Larger files are not read."""
    min_image_side: int = 1
    """Images with a shorter side are refused."""
    drops_bad_images: bool = True
    """Whether a document goes on without an image that is refused. Every other row is then a bad row."""


@dataclass
class ShardSample:
    """What goes into a shard for one row."""

    row: bytes
    """JSON; its images are named by their members."""
    images: dict[str, bytes]
    """Content of each image file, by the name of its member: ``0.jpg``."""
    left_out: list[RowError] = field(default_factory=list)
    """Images that a document lost."""


def make_sample(row: Row, limits: ImageLimits) -> ShardSample:
    """Check a row and its images, and name the images by their members.

    Raises:
        RowError: the row cannot be used.
    """
    left_out: list[RowError] = []
    reader = _ImageReader(row, limits)
    if limits.drops_bad_images and isinstance(row.content, Mapping) and isinstance(row.content.get("texts"), list):
        row = _without_bad_images(row, reader, left_out)
    _parse(row, row.content, row.image_root)
    images: dict[str, bytes] = {}

    def store(entry: str) -> str:
        content, suffix = reader.read(entry)
        name = f"{len(images)}.{suffix}"
        images[name] = content
        return name

    content = _replace_images(row.content, store)
    named = _parse(row, content, Path())
    if sorted(os.path.normpath(image.source) for image in named.images) != sorted(images):
        raise RowError(row.where, "row_ambiguous", "names images that its texts do not use.")
    content.setdefault(_ORIGIN, row.where)
    return ShardSample(_encode(row, content), images, left_out)


def _parse(row: Row, content: Any, image_root: Path) -> Any:
    try:
        return parse_conversation(content, row.where, image_root)
    except ValueError as error:
        raise RowError(row.where, "row_malformed", str(error).removeprefix(f"{row.where}: ")) from None
    except RecursionError:
        raise RowError(row.where, "row_malformed", "is nested too deeply.") from None


def _encode(row: Row, content: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, in a key that is no text of the sample
        return json.dumps(content).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(row.where, "row_malformed", f"cannot be written as JSON ({error}).") from None


def _without_bad_images(row: Row, reader: "_ImageReader", left_out: list[RowError]) -> Row:
    """A document without the images that cannot be used."""
    texts, images = row.content["texts"], row.content.get("images")
    if not isinstance(images, list) or len(images) != len(texts):
        return row  # the parser says it
    kept: list[tuple[Any, Any]] = []
    for text, image in zip(texts, images, strict=True):
        entry = _entry(image)
        if text is None and entry is not None:
            try:
                reader.read(entry)
            except RowError as error:
                left_out.append(error)
                continue
        kept.append((text, image))
    content = {**row.content, "texts": [text for text, _ in kept], "images": [image for _, image in kept]}
    return Row(row.where, content, row.image_root)


def _entry(image: Any) -> str | None:
    """The path or address that an image is given by; None: in no way that is known."""
    if isinstance(image, Mapping):
        image = image.get("path", image.get("url"))
    return image if isinstance(image, str) else None


def _replace_images(content: Mapping[str, Any], store: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a row that passes the parser, each image replaced by what ``store`` makes of its path."""

    def replaced(image: Any) -> Any:
        if image is None:
            return None
        entry = _entry(image)
        assert entry is not None, "the parser has passed it"
        return store(entry)

    row = dict(content)
    shape = shape_of(row)
    for key in ("images",) if shape == "texts" else ("image", "images"):
        value = row.get(key)
        if isinstance(value, list):
            row[key] = [replaced(image) for image in value]
        elif value not in (None, ""):
            row[key] = replaced(value)
    if shape in ("conversations", "messages"):
        content_key = "value" if "value" in row[shape][0] else "content"
        row[shape] = [_with_parts(turn, content_key, replaced) for turn in row[shape]]
    return row


def _with_parts(turn: Mapping[str, Any], content_key: str, replaced: Callable[[Any], Any]) -> dict[str, Any]:
    content = turn[content_key]
    parts = [_with_image(part, replaced) for part in content] if isinstance(content, list) else content
    return {**turn, content_key: parts}


def _with_image(part: Any, replaced: Callable[[Any], Any]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
        return part
    key = next((key for key in _PART_KEYS if part.get(key) is not None), None)
    if key is None:
        return part
    return {**part, key: replaced(part[key])}


class _ImageReader:
    """Reads the images of one row, each once."""

    def __init__(self, row: Row, limits: ImageLimits) -> None:
        self._row = row
        self._limits = limits
        self._read: dict[str, tuple[bytes, str]] = {}

    def read(self, entry: str) -> tuple[bytes, str]:
        """An image's file as it is, and the ending of its name; it is unpacked to see that it can be.

        Raises:
            RowError: it cannot be used.
        """
        if entry not in self._read:
            self._read[entry] = self._open(entry)
        return self._read[entry]

    def _open(self, entry: str) -> tuple[bytes, str]:
        source = self._source(entry)
        try:
            if not entry.startswith("data:"):
                self._check_bytes(source)
            with load_image(source, self._limits.max_image_pixels) as image:
                self._check_side(source, image.size)
            content = _content(source)
        except ImageError as error:
            raise self._error(error.reason, error.message) from None
        except (OSError, ValueError) as error:
            raise self._error("image_unreadable", f"image={source[:200]}: cannot be read ({error}).") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was loaded
            kind = Image.open(io.BytesIO(content)).format or "img"
        return content, _SUFFIXES.get(kind, kind.lower())

    def _source(self, entry: str) -> str:
        """What ``load_image`` takes."""
        if entry.startswith("data:"):
            return entry
        scheme, separator, rest = entry.partition("://")
        if separator and scheme == "file":
            return rest
        if separator:
            message = f"image={entry[:200]}: is a remote address; images are not downloaded."
            raise self._error("image_remote", message)
        return os.path.join(self._row.image_root, entry)

    def _check_bytes(self, path: str) -> None:
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        if size > self._limits.max_image_bytes:
            message = f"image={path}: has {size} bytes; --max-image-bytes={self._limits.max_image_bytes}."
            raise self._error("image_too_large", message)

    def _check_side(self, source: str, size: tuple[int, int]) -> None:
        if min(size) < self._limits.min_image_side:
            message = f"image={source[:200]}: has {size[0]} x {size[1]} pixels; "
            raise self._error("image_too_small", f"{message}--min-image-side={self._limits.min_image_side}.")

    def _error(self, reason: str, message: str) -> RowError:
        return RowError(self._row.where, reason, message)


def _content(source: str) -> bytes:
    """The bytes of an image that could be loaded."""
    if source.startswith("data:"):
        return base64.b64decode(source.partition(",")[2])
    return Path(source).read_bytes()
