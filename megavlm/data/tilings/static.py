"""The same grid for every image, and an overview.

Source: MM1 (arXiv 2403.09611), sub-image decomposition: an image of 1344 x 1344 as four tiles of 672 x 672, and before
them the whole of it at 672 x 672; for the continual pretraining of MM1.5 (arXiv 2409.20566) the same.
"""

from typing import Literal

import pydantic
from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.layout import WHOLE, Box, OverviewPlace, TileLayout, cut_tiles, grid_boxes


class StaticTilingConfig(Config):
    """Every image stretched to the same grid of tiles. MM1: 2 x 2 and the overview first."""

    kind: Literal["static"] = "static"
    columns: int = pydantic.Field(default=2, ge=1, le=8)
    rows: int = pydantic.Field(default=2, ge=1, le=8)
    overview: OverviewPlace = "before"
    """Where the tile of the whole image stands; a grid of one tile has none."""

    def build(self, tile_size: int) -> "StaticTiling":
        """Make the tiling for square tiles of ``tile_size`` pixels."""
        return StaticTiling(self, tile_size)


class StaticTiling:
    """See :class:`StaticTilingConfig`."""

    def __init__(self, config: StaticTilingConfig, tile_size: int) -> None:
        """Make the only grid; ``tile_size`` is the side of a tile, in pixels."""
        self.tile_size = tile_size
        self.max_tiles = config.columns * config.rows
        self._layout = TileLayout(
            config.columns,
            config.rows,
            has_thumbnail=config.overview != "none" and self.max_tiles > 1,
            thumbnail_first=config.overview == "before",
        )

    def layout(self, width: int, height: int) -> TileLayout:
        """Return the grid of every image."""
        return self._layout

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return the whole image as one tile, the only layout below the grid."""
        return WHOLE if layout.num_tiles > 1 else None

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return grid_boxes(layout, width, height)

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return cut_tiles(image, layout, self.tile_size)
