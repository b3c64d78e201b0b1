"""JSON and JSONL files of rows: conversations, captions, documents; and MMC4's, which have a shape of their own."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.prepare.item import FormatOptions, Item, Row, RowError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PIECE_BYTES = 1 << 20

Reshape = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class RowsFormat:
    """Rows of one file, or of all ``.jsonl`` and ``.json`` files in a folder."""

    source: Path
    options: FormatOptions
    needed_key: str | None = None
    """A key that every row must have; None: any shape that ``parse_conversation`` reads."""
    reshape: Reshape | None = None
    """Makes such a shape of a row of another; ``ValueError`` where it cannot."""

    def items(self) -> list[Item]:
        """See :class:`megavlm.prepare.item.Format`."""
        items = [item for path in json_files(self.source) for item in self._items_of(path)]
        if not items:
            raise ValueError(f"source={self.source}: has no row. Check the path.")
        return items

    def rows(self, item: Item) -> list[Row]:
        """See :class:`megavlm.prepare.item.Format`."""
        size = item.span[1] if item.span is not None else len(item.raw or b"")
        if size > self.options.max_row_bytes:
            raise RowError(
                item.where, "row_too_long", f"has {size} bytes; --max-row-bytes={self.options.max_row_bytes}."
            )
        row = decode_row(item.where, item.read_line())
        if self.needed_key is not None and self.needed_key not in row:
            keys = ", ".join(sorted(map(str, row))) or "none"
            raise RowError(item.where, "row_malformed", f"the row has no {self.needed_key} (keys: {keys}).")
        if self.reshape is not None:
            try:
                row = self.reshape(row)
            except ValueError as error:
                raise RowError(item.where, "row_malformed", f"{error}.") from None
        return [Row(item.where, row, self.options.image_root or item.path.parent)]

    def _items_of(self, path: Path) -> Iterator[Item]:
        name = path.name if path == self.source else str(path.relative_to(self.source))
        try:
            if path.suffix.lower() == ".json":
                for number, row in enumerate(_read_list(path)):
                    yield Item(f"{name}[{number}]", path, json.dumps(row, separators=(",", ":")).encode())
                return
            for number, span in line_spans(path):
                yield Item(f"{name}:{number}", path, span=span)
        except OSError as error:
            raise ValueError(f"source={path}: cannot be read ({error.strerror}). Check the path.") from None


def json_files(source: Path) -> list[Path]:
    """The file itself, or the JSON files in a folder, in the order of their names."""
    if not source.is_dir():
        return [source]
    return sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jsonl", ".json") and path.is_file())


def decode_row(where: str, raw: bytes) -> Mapping[str, Any]:
    """Decode a row.

    Raises:
        RowError: it is no JSON object.
    """
    try:
        row = json.loads(raw.removeprefix(_BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise RowError(where, "row_malformed", f"is not UTF-8 text (byte {error.start} of the row).") from None
    except ValueError as error:
        raise RowError(where, "row_malformed", f"is not valid JSON ({error}).") from None
    except RecursionError:
        raise RowError(where, "row_malformed", "is not valid JSON for a row (nested too deeply).") from None
    if not isinstance(row, Mapping):
        raise RowError(where, "row_malformed", f"is a {type(row).__name__}, not an object.")
    return row


def line_spans(path: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number (from 1), and offset and length in bytes, of each line of a file that is not blank."""
    offset, number = 0, 1
    with open(path, "rb") as file:
        start, is_blank = 0, True
        while piece := file.readline(_PIECE_BYTES):
            offset += len(piece)
            is_blank = is_blank and not piece.strip()
            if len(piece) == _PIECE_BYTES and not piece.endswith(b"\n"):
                continue  # a long line comes in pieces
            if not is_blank:
                yield number, (start, offset - start)
            start, number, is_blank = offset, number + 1, True
        if not is_blank:
            yield number, (start, offset - start)


def _read_list(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"source={path}: is not valid JSON ({error}). A file with one object a line must be named .jsonl."
        ) from None
    if isinstance(content, Mapping):
        return [content]
    if not isinstance(content, list):
        raise ValueError(f"source={path}: holds one {type(content).__name__}, not a list of rows. Check the file.")
    return content


def mmc4_document(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make a document of a row of MMC4 (arXiv 2304.06939): each image stands before the sentence that it is matched to.

    Raises:
        ValueError: the row's lists are missing or name a sentence that is not there.
    """
    sentences, images = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
        raise ValueError("text_list is no list of texts")
    if not isinstance(images, list) or not all(isinstance(image, Mapping) for image in images):
        raise ValueError("image_info is no list of objects")
    before: dict[int, list[Any]] = {}
    for number, image in enumerate(images):
        place = image.get("matched_text_index")
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(sentences):
            raise ValueError(
                f"image_info[{number}].matched_text_index is {place!r}, and text_list has {len(sentences)} entries"
            )
        before.setdefault(place, []).append(image.get("image_name"))
    entries: list[tuple[str | None, Any]] = []
    for place, sentence in enumerate(sentences):
        entries += [(None, name) for name in before.get(place, [])]
        entries.append((sentence + (" " if place + 1 < len(sentences) else ""), None))
    return {"texts": [text for text, _ in entries], "images": [image for _, image in entries]}
