"""Plain text files as documents."""

import re
from dataclasses import dataclass
from pathlib import Path

from megavlm.prepare.item import FormatOptions, Item, Row, RowError

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class TextFormat:
    """A text file, or all ``.txt`` and ``.md`` files in a folder: UTF-8, each cut into documents."""

    source: Path
    options: FormatOptions

    def items(self) -> list[Item]:
        """See :class:`megavlm.prepare.item.Format`."""
        files = files_with_suffix(self.source, SUFFIXES)
        return [Item(path.name if path == self.source else str(path.relative_to(self.source)), path) for path in files]

    def rows(self, item: Item) -> list[Row]:
        """See :class:`megavlm.prepare.item.Format`."""
        text = read_text(item, None)
        documents = split_text(text, self.options.max_document_characters)
        return [
            Row(f"{item.where}#{number}", {"text": document}, item.path.parent)
            for number, document in enumerate(documents, start=1)
        ]


def files_with_suffix(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or the files in a folder with one of the suffixes, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    if not source.is_dir():
        return [source]
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise ValueError(f"source={source}: has no {' or '.join(suffixes)} file. Check the path and --format.")
    return files


def read_text(item: Item, most_bytes: int | None) -> str:
    """Read the file of an item as UTF-8.

    Raises:
        RowError: it cannot be read, is too long or is no text.
    """
    try:
        if most_bytes is not None and (size := item.path.stat().st_size) > most_bytes:
            raise RowError(item.where, "row_too_long", f"has {size} bytes; --max-row-bytes={most_bytes}.")
        return item.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(item.where, "row_malformed", f"is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise RowError(item.where, "row_malformed", f"cannot be read ({error.strerror}).") from None


def split_text(text: str, most_characters: int) -> list[str]:
    """Cut a text into documents, which together are the text but for blank ends.

    Args:
        text: any.
        most_characters: of a document. The cut is made at the last blank line before it, else at the last line, else
            at the last space, else anywhere.
    """
    documents = []
    start = 0
    while len(text) - start > most_characters:
        head = text[start : start + most_characters + 1]
        cut = next((found.end() for found in (_last(pattern, head) for pattern in _BORDERS) if found), most_characters)
        documents.append(head[: min(cut, most_characters)])
        start += min(cut, most_characters)
    return [document.strip() for document in [*documents, text[start:]] if document.strip()]


_BORDERS = (re.compile(r"\n[ \t]*\n"), re.compile(r"\n"), re.compile(r" "))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match in the second half of a text."""
    found = list(pattern.finditer(text, len(text) // 2))
    return found[-1] if found else None
