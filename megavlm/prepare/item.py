"""What passes from a format to the writer of shards: places in the source, and the rows that they hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """A place in the source. Cheap to find, and handed to another process, which reads it."""

    where: str
    """Names it, from the source's own name on: ``rows.jsonl:17``."""
    path: Path
    """The file that it stands in."""
    raw: bytes | None = None
    """Its JSON, where it is a row of a JSON list."""
    span: tuple[int, int] | None = None
    """Offset and length in bytes, where it is a line of the file."""

    def read_line(self) -> bytes:
        """Read the JSON of a row.

        Raises:
            RowError: the file cannot be read any more.
        """
        if self.raw is not None:
            return self.raw
        assert self.span is not None, self
        try:
            with open(self.path, "rb") as file:
                file.seek(self.span[0])
                return file.read(self.span[1])
        except OSError as error:
            raise RowError(self.where, "row_malformed", f"cannot be read ({error.strerror}).") from None


@dataclass(frozen=True)
class Row:
    """A row that an item holds, in one of the shapes of ``megavlm.data.row_shape``."""

    where: str
    content: Any
    image_root: Path
    """Relative paths of its images begin here."""


class RowError(Exception):
    """A row, or an image of it, that cannot be used."""

    def __init__(self, where: str, reason: str, message: str) -> None:
        """Keep what goes into the list of bad rows.

        Args:
            where: names the row.
            reason: short and countable: ``row_malformed``, ``row_too_long``, ``image_missing`` ...
            message: what is wrong, with the numbers.
        """
        super().__init__(where, reason, message)
        self.where = where
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class FormatOptions:
    """What formats let a person choose."""

    image_root: Path | None = None
    """Where relative paths of images begin; None: the folder of the file that names them."""
    max_row_bytes: int = 16 << 20
    """Longer rows and pages are bad rows."""
    max_document_characters: int = 20_000
    """Plain text is cut into documents of at most so many, between paragraphs where it can be."""


class Format(Protocol):
    """What the module of each format offers. Objects are handed to other processes."""

    def items(self) -> list[Item]:
        """Find the items of the source, always in the same order.

        Raises:
            ValueError: the source cannot be read, or holds nothing of this format.
        """

    def rows(self, item: Item) -> list[Row]:
        """Read an item.

        Raises:
            RowError: it cannot be used.
        """
