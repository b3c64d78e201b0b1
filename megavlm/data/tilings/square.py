"""The whole image as one tile, padded to a square.

Source: LLaVA 1.5 (arXiv 2310.03744), ``image_aspect_ratio: pad``.
"""

from typing import Literal

from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.layout import MEAN_COLOR, WHOLE, Box, Color, TileLayout, cut_tiles, fitted_size

LONGEST_SIDE = 8192
"""Pixels of a side beyond which an image is made smaller before it is padded."""


class SquareTilingConfig(Config):
    """One tile for each image: the whole of it on the middle of a square of one colour, its aspect ratio kept."""

    kind: Literal["square"] = "square"
    padding_color: Color = MEAN_COLOR
    """Of what the image does not cover; 0 to 255. The default is CLIP's mean, as in LLaVA."""

    def build(self, tile_size: int) -> "SquareTiling":
        """Make the tiling for square tiles of ``tile_size`` pixels."""
        return SquareTiling(self, tile_size)


class SquareTiling:
    """See :class:`SquareTilingConfig`."""

    max_tiles = 1

    def __init__(self, config: SquareTilingConfig, tile_size: int) -> None:
        """Keep the colour and the side of a tile, in pixels."""
        self.tile_size = tile_size
        self._color = config.padding_color

    def layout(self, width: int, height: int) -> TileLayout:
        """Return the only layout there is."""
        return WHOLE

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return ``None``: one tile is the least."""
        return None

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """See :class:`megavlm.data.tilings.Tiling`."""
        return [(0, 0, width, height)]

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """Pad the original image, then resize it, in this order as LLaVA does.

        An image with a side above :data:`LONGEST_SIDE` is first made smaller: its square would fill the memory.
        """
        if max(image.size) > LONGEST_SIDE:
            size = fitted_size(*image.size, LONGEST_SIDE, LONGEST_SIDE)
            image = image.resize(size, Image.Resampling.BICUBIC)
        side = max(image.size)
        square = Image.new("RGB", (side, side), self._color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return cut_tiles(square, WHOLE, self.tile_size)
