"""Where rows come from, as data; what the kinds of data sets share."""

from pathlib import Path
from typing import Literal

import pydantic

from megavlm.config import Config
from megavlm.data.grounding import CoordinateStyle

BadRowPolicy = Literal["error", "skip"]


class SourceConfig(Config):
    """One source of rows; what all kinds of them have."""

    path: Path
    """The file."""
    limit: int | None = pydantic.Field(default=None, ge=1)
    """Use only so many rows from the beginning."""
    bad_rows: BadRowPolicy = "error"
    """What to do, at opening, with rows that are malformed or lack an image file: ``error`` stops, ``skip`` goes on."""
    coordinate_style: CoordinateStyle = "mm1_5"
    """How the rows' boxes and points are written: ``mm1_5`` (0 to 999, in brackets) or ``nvlm`` (0 to 1000)."""

    @property
    def name(self) -> str:
        """What logs call it."""
        return self.path.name

    @property
    def source_names(self) -> list[str]:
        """Of the only source."""
        return [self.name]


class FileConfig(SourceConfig):
    """A file of rows whose images are files of their own."""

    image_root: Path | None = None
    """Relative paths of images begin here; the file's own folder where not given."""
