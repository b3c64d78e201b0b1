"""A file that is one JSON list of objects, as LLaVA publishes its data."""

import json
from array import array
from pathlib import Path
from typing import Literal

import numpy

from megavlm.data.conversation import Conversation
from megavlm.data.datasets.row_check import RowChecker, read_row
from megavlm.data.datasets.source import FileConfig


class JsonDatasetConfig(FileConfig):
    """A file that is one JSON list, its objects in any of the shapes that ``parse_conversation`` reads."""

    kind: Literal["json"] = "json"

    def build(self) -> "JsonDataset":
        """Read the file and check every row."""
        return JsonDataset(self)


class JsonDataset:
    """Rows of a JSON list by number. The rows stay in memory as text, in one block that worker processes share."""

    def __init__(self, config: JsonDatasetConfig) -> None:
        """Read the file once.

        Raises:
            ValueError: the file cannot be read, has bad rows (unless ``bad_rows`` is ``skip``) or no usable one.
        """
        self._path = config.path
        self._image_root = config.image_root or config.path.parent
        self._coordinate_style = config.coordinate_style
        checker = RowChecker(config.path, self._image_root, config.coordinate_style)
        numbers, ends = array("q"), array("q", [0])
        text = bytearray()
        for number, row in enumerate(_read_list(config.path)[: config.limit]):
            raw = json.dumps(row, separators=(",", ":")).encode()
            if checker.is_usable(raw, self._key(number)):
                text += raw
                numbers.append(number)
                ends.append(len(text))
        checker.finish(config.bad_rows)
        self.num_bad_rows = checker.num_bad_rows
        self.bad_rows = checker.bad_rows
        self._text = bytes(text)
        self._numbers = numpy.array(numbers, dtype=numpy.int64)
        self._ends = numpy.array(ends, dtype=numpy.int64)

    def __len__(self) -> int:
        """Usable rows."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """See :class:`megavlm.data.datasets.Dataset`."""
        key = self._key(int(self._numbers[index]))
        return key, read_row(
            self._text[self._ends[index] : self._ends[index + 1]], key, self._image_root, self._coordinate_style
        )

    def _key(self, number: int) -> str:
        return f"{self._path}[{number}]"


def _read_list(path: Path) -> list[object]:
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"dataset.path={path}: cannot be read ({error.strerror}). Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"dataset.path={path}: is not valid JSON ({error}). A file with one object a line needs kind=jsonl."
        ) from None
    if isinstance(rows, list):
        return rows
    raise ValueError(
        f"dataset.path={path}: holds one {type(rows).__name__}, not a list of rows. "
        "A file with one object a line needs kind=jsonl."
    )
