"""Dynamic high resolution: a grid of tiles with nearly the image's aspect ratio, and a thumbnail.

Source: InternVL 1.5 (arXiv 2404.16821), ``dynamic_preprocess``; NVLM (arXiv 2409.11402) uses it with at most 6 tiles.
"""

from typing import Literal

import pydantic
from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.layout import Box, TileLayout, cut_tiles, grid_boxes, next_rung


class DynamicTilingConfig(Config):
    """A grid of tiles with nearly the image's aspect ratio."""

    kind: Literal["dynamic"] = "dynamic"
    max_tiles: int = pydantic.Field(default=6, ge=1, le=64)
    """Most tiles of one image, the thumbnail not counted. NVLM: 6."""
    min_tiles: int = pydantic.Field(default=1, ge=1)
    """Fewest tiles of one image, the thumbnail not counted."""
    use_thumbnail: bool = True
    """Whether the whole image follows as one more tile. An image of a single tile never gets one."""

    @pydantic.model_validator(mode="after")
    def _check_range(self) -> "DynamicTilingConfig":
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"min_tiles={self.min_tiles}: is above max_tiles={self.max_tiles}. Lower one or raise the other"
            )
        return self

    def build(self, tile_size: int) -> "DynamicTiling":
        """Make the tiling for square tiles of ``tile_size`` pixels."""
        return DynamicTiling(self, tile_size)


class DynamicTiling:
    """See :class:`DynamicTilingConfig`."""

    def __init__(self, config: DynamicTilingConfig, tile_size: int) -> None:
        """List the grids; ``tile_size`` is the side of a tile, in pixels."""
        self.tile_size = tile_size
        self.max_tiles = config.max_tiles
        self._min_tiles = config.min_tiles
        self._use_thumbnail = config.use_thumbnail
        self._grids = candidate_grids(config.min_tiles, config.max_tiles)

    def layout(self, width: int, height: int) -> TileLayout:
        """Choose the layout of an image of ``width`` by ``height`` pixels."""
        return self._layout_within(width, height, self.max_tiles)

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return the layout at the next step of the ladder; ``None`` at its end or at ``min_tiles``."""
        limit = next_rung(layout.columns * layout.rows)
        return None if limit is None or limit < self._min_tiles else self._layout_within(width, height, limit)

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return grid_boxes(layout, width, height)

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return cut_tiles(image, layout, self.tile_size)

    def _layout_within(self, width: int, height: int, max_tiles: int) -> TileLayout:
        grids = [grid for grid in self._grids if grid[0] * grid[1] <= max_tiles]
        columns, rows = nearest_grid(width, height, grids, self.tile_size)
        return TileLayout(columns, rows, has_thumbnail=self._use_thumbnail and columns * rows > 1)


def candidate_grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """List the grids ``(columns, rows)`` of ``min_tiles`` to ``max_tiles`` tiles, smaller ones first.

    The published code leaves the order among grids of one size to a Python set. It matters only for exact ties between
    two grids of the same size, which exist only for ``(min_tiles, max_tiles)`` = (2, 2), (2, 3), (4, 4) and (4, 5).
    """
    return sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles // columns + 1)
            if columns * rows >= min_tiles
        ),
        key=lambda grid: (grid[0] * grid[1], grid[0]),
    )


def nearest_grid(width: int, height: int, grids: list[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """Choose the grid whose aspect ratio is nearest the image's.

    Of grids equally near, a later (larger) one wins only if the image has more than half of its pixels.

    Args:
        width, height: image size in pixels.
        grids: ``(columns, rows)``, in the order in which ties are decided.
        tile_size: side of a tile, in pixels.

    Returns:
        ``(columns, rows)``.
    """
    ratio = width / height
    best = grids[0]
    least = abs(ratio - best[0] / best[1])
    for columns, rows in grids[1:]:
        # Floating point on purpose: which ratios tie is part of the published rule.
        difference = abs(ratio - columns / rows)
        has_enough_pixels = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < least or (difference == least and has_enough_pixels):
            best, least = (columns, rows), difference
    return best
