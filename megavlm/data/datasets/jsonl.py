"""A file with one JSON object a line."""

from array import array
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy

from megavlm.data.conversation import Conversation
from megavlm.data.datasets.row_check import RowChecker, read_row
from megavlm.data.datasets.source import FileConfig

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; the JSON reader passes over it


class JsonlDatasetConfig(FileConfig):
    """A file with one JSON object a line, in any of the shapes that ``parse_conversation`` reads."""

    kind: Literal["jsonl"] = "jsonl"

    def build(self) -> "JsonlDataset":
        """Open the file and check every row."""
        return JsonlDataset(self)


class JsonlDataset:
    """Rows of a file by number. Memory holds where each row begins, not the rows."""

    def __init__(self, config: JsonlDatasetConfig) -> None:
        """Read the file once.

        Raises:
            ValueError: the file cannot be read, has bad rows (unless ``bad_rows`` is ``skip``) or no usable one.
        """
        self._path = config.path
        self._image_root = config.image_root or config.path.parent
        self._coordinate_style = config.coordinate_style
        checker = RowChecker(config.path, self._image_root, config.coordinate_style)
        offsets, line_numbers = array("q"), array("q")
        try:
            with open(config.path, "rb") as file:
                for line_number, offset, line in _rows(file):
                    if not checker.num_rows and line.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
                        raise ValueError(
                            f"dataset.path={config.path}: is one JSON list, not one object a line. Use kind=json."
                        )
                    if checker.is_usable(line, f"{config.path}:{line_number}"):
                        offsets.append(offset)
                        line_numbers.append(line_number)
                    if checker.num_rows == config.limit:
                        break
        except OSError as error:
            raise ValueError(
                f"dataset.path={config.path}: cannot be read ({error.strerror}). Check the path."
            ) from None
        checker.finish(config.bad_rows)
        self.num_bad_rows = checker.num_bad_rows
        self.bad_rows = checker.bad_rows
        self._offsets = numpy.array(offsets, dtype=numpy.int64)
        self._line_numbers = numpy.array(line_numbers, dtype=numpy.int64)

    def __len__(self) -> int:
        """Usable rows."""
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """See :class:`megavlm.data.datasets.Dataset`."""
        key = f"{self._path}:{self._line_numbers[index]}"
        try:
            with open(self._path, "rb") as file:
                file.seek(int(self._offsets[index]))
                line = file.readline()
        except OSError as error:
            raise ValueError(f"{key}: cannot be read any more ({error.strerror}).") from None
        return key, read_row(line, key, self._image_root, self._coordinate_style)


def _rows(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Line number (from 1), offset in bytes and content of each line that is not blank."""
    offset = 0
    for line_number, line in enumerate(file, start=1):
        if line.strip():
            yield line_number, offset, line
        offset += len(line)
