"""From the files that people have to tar shards: read, checked, written in parallel, resumed where it was stopped."""

from megavlm.prepare.formats import FORMATS
from megavlm.prepare.item import FormatOptions
from megavlm.prepare.run import BAD_ROWS, Prepared, PrepareSettings, prepare
from megavlm.prepare.sample import ImageLimits

__all__ = ["BAD_ROWS", "FORMATS", "FormatOptions", "ImageLimits", "PrepareSettings", "Prepared", "prepare"]
