"""Reads and checks the rows of a JSON file; what its kinds share."""

import json
import os
from pathlib import Path

from megavlm.data.conversation import Conversation, parse_conversation
from megavlm.data.datasets.source import BadRowPolicy
from megavlm.data.grounding import CoordinateStyle

_NUM_LISTED = 10


def read_row(raw: bytes, where: str, image_root: Path, coordinate_style: CoordinateStyle = "mm1_5") -> Conversation:
    """Decode and parse one row.

    Args:
        raw: JSON.
        where: names the row in errors.
        image_root: relative paths of images begin here.
        coordinate_style: how boxes and points are written.

    Raises:
        ValueError: beginning with ``where``, saying what is wrong with the row.
    """
    try:
        row = json.loads(raw)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text (byte {error.start} of the row).") from None
    except ValueError as error:
        raise ValueError(f"{where}: is not valid JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{where}: is not valid JSON for a row (nested too deeply).") from None
    return parse_conversation(row, where, image_root, coordinate_style=coordinate_style)


class RowChecker:
    """Checks rows one by one, and then says what was wrong with them all."""

    def __init__(self, path: Path, image_root: Path, coordinate_style: CoordinateStyle = "mm1_5") -> None:
        """Name the file and the folder of its images."""
        self.num_rows = 0
        self.num_bad_rows = 0
        self.bad_rows: list[str] = []
        self._path = path
        self._image_root = image_root
        self._coordinate_style = coordinate_style

    def is_usable(self, raw: bytes, where: str) -> bool:
        """Count a row; whether it is well formed and its image files are there."""
        self.num_rows += 1
        try:
            conversation = read_row(raw, where, self._image_root, self._coordinate_style)
            for image in conversation.images:
                if not image.source.startswith("data:") and not os.path.isfile(image.source):
                    raise ValueError(f"{where}: the image {image.source} is missing.")
        except ValueError as error:
            self.num_bad_rows += 1
            if self.num_bad_rows <= _NUM_LISTED:
                self.bad_rows.append(str(error))
            return False
        return True

    def finish(self, policy: BadRowPolicy) -> None:
        """Judge the file.

        Raises:
            ValueError: rows are bad and the policy is ``error``, or no usable row is left.
        """
        if self.num_bad_rows and policy == "error":
            rest = self.num_bad_rows - len(self.bad_rows)
            lines = "\n  ".join([*self.bad_rows, *([f"... and {rest} more"] if rest else [])])
            raise ValueError(
                f"dataset.path={self._path}: {self.num_bad_rows} of {self.num_rows} rows cannot be used. "
                f"Mend them, or leave them out with bad_rows=skip.\n  {lines}"
            )
        if self.num_bad_rows == self.num_rows:
            listed = "".join(f"\n  {line}" for line in self.bad_rows)
            raise ValueError(
                f"dataset.path={self._path}: has no usable row ({self.num_rows} rows, {self.num_bad_rows} bad). "
                f"Check the file.{listed}"
            )
