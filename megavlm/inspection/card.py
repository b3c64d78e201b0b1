"""What a page shows of a sample, ready for its template: every text is legible, every picture small."""

from dataclasses import dataclass
from typing import Any

from megavlm.inspection.token_view import Category

NUM_TILE_COLOURS = 8
"""Tiles of an image take them in turn."""


@dataclass(frozen=True)
class TileBox:
    """A tile on its image; all in pixels of the image."""

    number: int
    colour: int
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class ImageCard:
    """An image with its tiles drawn on it."""

    uri: str
    width: int
    height: int
    name: str
    note: str
    boxes: tuple[TileBox, ...]

    @property
    def label_size(self) -> float:
        """Of the numbers on it, in pixels of the image."""
        return max(self.width, self.height) / 22.0


@dataclass(frozen=True)
class TileCard:
    """A tile as the model gets it."""

    number: int
    colour: int
    uri: str
    tag: str
    route: str
    """Where its features go."""


@dataclass(frozen=True)
class TokenRunCard:
    """Tokens alike, one behind the other."""

    category: Category
    message: int | None
    is_trained: bool
    tile: int | None
    num_tokens: int
    texts: tuple[str, ...]
    """Of each; none for image tokens, which are shown as one."""


@dataclass(frozen=True)
class Stretch:
    """A part of a row."""

    start: int
    stop: int
    what: str
    """A category, ``padding``, ``loss``; or ``here`` and ``other`` for samples."""
    label: str = ""
    number: int | None = None
    """Of the sample."""


@dataclass(frozen=True)
class RowCard:
    """The row of the micro-batch that a sample stands in."""

    step: int
    micro_batch: int
    row: int
    num_rows: int
    length: int
    num_padding: int
    samples: tuple[Stretch, ...]
    categories: tuple[Stretch, ...]
    losses: tuple[Stretch, ...]


@dataclass(frozen=True)
class SampleCard:
    """A sample that is in a row."""

    number: int
    position: int
    source: str
    source_number: int
    key: str
    kind: str
    summary: str
    """Its numbers in one line."""
    turns: str
    """Who speaks in turn, and what was lost so that it fits."""
    start: int
    stop: int
    row: RowCard
    images: tuple[ImageCard, ...]
    tiles: tuple[TileCard, ...]
    runs: tuple[TokenRunCard, ...]
    left_out: str
    """What is too much to be drawn."""
    counts: dict[str, int]
    facts: dict[str, Any]
    """For the page's script: ids, labels and weights of the positions, and which tiles each sees."""


@dataclass(frozen=True)
class UnusedCard:
    """A sample that cannot be used."""

    number: int
    source: str
    source_number: int
    key: str
    reason: str
    message: str
    kind: str = "unusable"
