"""Consistent aspect ratio dynamic high resolution: the aspect ratio kept, tiles that overlap, and a thumbnail.

Source: POINTS (arXiv 2409.04828), section 3.2, and the code that its authors published. The paper prints the ratio of
the resize upside down; the short side of the image becomes as long as the grid's, the long side no longer than it.
"""

from typing import Literal

import pydantic
from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.dynamic import candidate_grids
from megavlm.data.tilings.layout import WHOLE, Box, TileLayout, crop_tiles, join_tiles, next_rung


class CattyTilingConfig(Config):
    """A grid at least as long as the image, its tiles moved together until they overlap. POINTS: at most 8 tiles."""

    kind: Literal["catty"] = "catty"
    max_tiles: int = pydantic.Field(default=8, ge=1, le=64)
    """Most tiles of one image, the thumbnail not counted. An image whose aspect ratio is larger is first squeezed to
    it."""
    use_thumbnail: bool = True
    """Whether the whole image follows as one more tile, also behind a single tile (as published)."""

    def build(self, tile_size: int) -> "CattyTiling":
        """Make the tiling for square tiles of ``tile_size`` pixels."""
        return CattyTiling(self, tile_size)


class CattyTiling:
    """See :class:`CattyTilingConfig`."""

    def __init__(self, config: CattyTilingConfig, tile_size: int) -> None:
        """Keep both; ``tile_size`` is the side of a tile, in pixels."""
        self.tile_size = tile_size
        self.max_tiles = config.max_tiles
        self._use_thumbnail = config.use_thumbnail

    def layout(self, width: int, height: int) -> TileLayout:
        """Choose the layout of an image of ``width`` by ``height`` pixels."""
        return self._layout_within(width, height, self.max_tiles)

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return the layout at the next step of the ladder; at its end the whole image as one tile."""
        if layout.num_tiles == 1:
            return None
        limit = next_rung(layout.columns * layout.rows)
        return WHOLE if limit in (None, 1) else self._layout_within(width, height, limit)

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """See :class:`megavlm.data.tilings.Tiling`."""
        sides = self._resized(layout, width, height)
        stride = self._stride(layout, *sides)

        def place(at: int, axis: int) -> int:
            return at * (width, height)[axis] // sides[axis]

        grid = [
            (
                place(column * stride[0], 0),
                place(row * stride[1], 1),
                place(column * stride[0] + self.tile_size, 0),
                place(row * stride[1] + self.tile_size, 1),
            )
            for row in range(layout.rows)
            for column in range(layout.columns)
        ]
        return layout.with_thumbnail(grid, (0, 0, width, height))

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """See :class:`megavlm.data.tilings.Tiling`. The thumbnail is a resize of the resized image."""
        side = self.tile_size
        if layout == WHOLE:
            return crop_tiles(image.resize((side, side), Image.Resampling.BILINEAR), layout, side, (0, 0))
        squeezed = _squeezed(layout, *image.size)
        if squeezed != image.size:
            image = image.resize(squeezed, Image.Resampling.BILINEAR)
        size = self._resized(layout, *image.size)
        canvas = image.resize(size, Image.Resampling.BILINEAR)
        grid = crop_tiles(canvas, layout, side, self._stride(layout, *size))
        return join_tiles(grid, layout, lambda: canvas.resize((side, side), Image.Resampling.BILINEAR))

    def _layout_within(self, width: int, height: int, max_tiles: int) -> TileLayout:
        ratio = min(float(max_tiles), max(1.0 / max_tiles, width / height))
        columns, rows = one_sided_grid(ratio, _num_tiles_of(width, height, max_tiles, self.tile_size), max_tiles)
        return TileLayout(columns, rows, has_thumbnail=self._use_thumbnail)

    def _resized(self, layout: TileLayout, width: int, height: int) -> tuple[int, int]:
        """Size of the image when its short side is as long as the grid's."""
        width, height = _squeezed(layout, width, height)
        # floating point on purpose: which pixel it is rounded down to is part of the published rule
        if width < height:
            new_width = layout.columns * self.tile_size
            return new_width, int(height / width * new_width)
        new_height = layout.rows * self.tile_size
        return int(width / height * new_height), new_height

    def _stride(self, layout: TileLayout, width: int, height: int) -> tuple[int, int]:
        """Pixels from one column to the next, and from one row to the next."""
        return (
            (width - self.tile_size) // max(1, layout.columns - 1),
            (height - self.tile_size) // max(1, layout.rows - 1),
        )


def one_sided_grid(ratio: float, num_tiles: float, max_tiles: int) -> tuple[int, int]:
    """Choose the grid for an aspect ratio: the nearest of those at least as elongated, then the nearest in size.

    Args:
        ratio: width / height of the image, ``1 / max_tiles`` to ``max_tiles``.
        num_tiles: area of the image, in tiles.
        max_tiles: most tiles.

    Returns:
        ``(columns, rows)``.
    """
    grids = [
        (columns, rows)
        for columns, rows in candidate_grids(1, max_tiles)
        if ratio == 1.0 or (columns / rows >= ratio if ratio > 1.0 else columns / rows <= ratio)
    ]
    return min(grids, key=lambda grid: (abs(grid[0] / grid[1] - ratio), abs(grid[0] * grid[1] - num_tiles)))


def _num_tiles_of(width: int, height: int, max_tiles: int, tile_size: int) -> float:
    """Area of an image in tiles, once it is squeezed to the longest grid."""
    width, height = min(width, max_tiles * height), min(height, max_tiles * width)
    return (width / tile_size) * (height / tile_size)


def _squeezed(layout: TileLayout, width: int, height: int) -> tuple[int, int]:
    """Size of an image that is squeezed because it is longer than every grid, which its own grid shows."""
    if width > height and width / height > layout.columns / layout.rows:
        return layout.columns * height // layout.rows, height
    if width < height and width / height < layout.columns / layout.rows:
        return width, layout.rows * width // layout.columns
    return width, height
