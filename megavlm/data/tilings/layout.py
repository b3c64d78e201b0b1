"""A grid of tiles over an image, and the cutting of pixels by it."""

from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class TileLayout:
    """Which tiles an image becomes."""

    columns: int
    rows: int
    has_thumbnail: bool
    """Whether the whole image follows as one more tile."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the thumbnail included."""
        return self.columns * self.rows + int(self.has_thumbnail)

    def is_whole_image(self, tile: int) -> bool:
        """Whether a tile (counted from 0) shows the whole image: the thumbnail, or the only tile."""
        return self.num_tiles == 1 or (self.has_thumbnail and tile == self.num_tiles - 1)


def cut_tiles(image: Image.Image, layout: TileLayout, tile_size: int) -> Tensor:
    """Resize an image to its grid and cut it.

    The image is stretched to the grid (its aspect ratio is not kept) in one bicubic resize and cut row by row. The
    thumbnail is a resize of the original, not of the stretched image.

    Source: ``dynamic_preprocess`` of InternVL 1.5 (arXiv 2404.16821), as used by NVLM (arXiv 2409.11402). The resize
    that the published code applies once more to each tile leaves a tile of that size as it is.

    Args:
        image: RGB.
        layout: the grid.
        tile_size: side of a tile, in pixels.

    Returns:
        ``[layout.num_tiles, 3, tile_size, tile_size]`` uint8.
    """
    size = (layout.columns * tile_size, layout.rows * tile_size)
    stretched = numpy.asarray(image.resize(size, Image.Resampling.BICUBIC))
    grid = stretched.reshape(layout.rows, tile_size, layout.columns, tile_size, 3)
    tiles = grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile_size, tile_size)
    if layout.has_thumbnail:
        thumbnail = numpy.asarray(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
        tiles = numpy.concatenate([tiles, thumbnail.transpose(2, 0, 1)[None]])
    return torch.from_numpy(numpy.array(tiles, copy=True, order="C"))
