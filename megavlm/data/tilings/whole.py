"""The whole image as one tile."""

from typing import Literal

from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.layout import WHOLE, Box, TileLayout, cut_tiles, grid_boxes


class WholeTilingConfig(Config):
    """One tile for each image: the whole of it, stretched to a square."""

    kind: Literal["whole"] = "whole"

    def build(self, tile_size: int) -> "WholeTiling":
        """Make the tiling for square tiles of ``tile_size`` pixels."""
        return WholeTiling(tile_size)


class WholeTiling:
    """See :class:`WholeTilingConfig`."""

    max_tiles = 1

    def __init__(self, tile_size: int) -> None:
        """Keep the side of a tile, in pixels."""
        self.tile_size = tile_size

    def layout(self, width: int, height: int) -> TileLayout:
        """Return the only layout there is."""
        return WHOLE

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return ``None``: one tile is the least."""
        return None

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return grid_boxes(layout, width, height)

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return cut_tiles(image, layout, self.tile_size)
