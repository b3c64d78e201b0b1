"""A grid of tiles over an image, and the cutting of pixels by it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from PIL import Image
from torch import Tensor

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the original image; rounded down, and clipped to the image."""

Color = tuple[int, int, int]
"""Red, green, blue, each 0 to 255."""

MEAN_COLOR: Color = (122, 116, 104)
"""The mean colour that CLIP's images are normalised by, as LLaVA rounds it; about black after normalisation."""

OverviewPlace = Literal["before", "after", "none"]
"""Where the tile of the whole image stands."""

DEGRADATION_LADDER = (12, 8, 6, 4, 2, 1)
"""Where a sample is too long, an image goes down to the next number here (Megatron-LM's
``num_tiles_degradation_map``, which knows no step from the numbers in between)."""


@dataclass(frozen=True)
class TileLayout:
    """Which tiles an image becomes: a grid, row by row, and maybe the whole image as one more tile."""

    columns: int
    rows: int
    has_thumbnail: bool
    """Whether there is a tile of the whole image beside the grid."""
    thumbnail_first: bool = False
    """Whether it stands before the grid; otherwise behind it."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the thumbnail included."""
        return self.columns * self.rows + int(self.has_thumbnail)

    def is_whole_image(self, tile: int) -> bool:
        """Whether a tile (counted from 0) shows the whole image: the thumbnail, or the only tile."""
        return self.num_tiles == 1 or self.cells()[tile] is None

    def cells(self) -> list[tuple[int, int] | None]:
        """``(column, row)`` of each tile, in the order of the tiles; None for the thumbnail."""
        grid: list[tuple[int, int] | None] = [
            (column, row) for row in range(self.rows) for column in range(self.columns)
        ]
        return self.with_thumbnail(grid, None)

    def with_thumbnail(self, grid: Sequence, thumbnail: object) -> list:
        """What stands for the tiles of the grid, and what stands for the thumbnail if there is one, in their order."""
        if not self.has_thumbnail:
            return list(grid)
        return [thumbnail, *grid] if self.thumbnail_first else [*grid, thumbnail]


WHOLE = TileLayout(columns=1, rows=1, has_thumbnail=False)
"""One tile that shows the whole image."""


def next_rung(num_tiles: int) -> int | None:
    """Return the next lower number of :data:`DEGRADATION_LADDER`; None where there is none."""
    return next((limit for limit in DEGRADATION_LADDER if limit < num_tiles), None)


def grid_boxes(layout: TileLayout, width: int, height: int) -> list[Box]:
    """Boxes of tiles that cut the image into equal parts, in the order of the tiles."""
    grid = [
        (
            column * width // layout.columns,
            row * height // layout.rows,
            (column + 1) * width // layout.columns,
            (row + 1) * height // layout.rows,
        )
        for row in range(layout.rows)
        for column in range(layout.columns)
    ]
    return layout.with_thumbnail(grid, (0, 0, width, height))


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
    grid = crop_tiles(image.resize(size, Image.Resampling.BICUBIC), layout, tile_size, (tile_size, tile_size))
    return join_tiles(grid, layout, lambda: image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))


def crop_tiles(canvas: Image.Image, layout: TileLayout, tile_size: int, stride: tuple[int, int]) -> Tensor:
    """Cut the grid out of an image, row by row.

    Args:
        canvas: RGB; holds the last tile.
        layout: the grid.
        tile_size: side of a tile, in pixels.
        stride: pixels from one column to the next, and from one row to the next; tiles overlap where it is less than a
            tile.

    Returns:
        ``[layout.columns * layout.rows, 3, tile_size, tile_size]`` uint8.
    """
    pixels = torch.from_numpy(numpy.array(canvas)).permute(2, 0, 1)
    return torch.stack(
        [
            pixels[:, top : top + tile_size, left : left + tile_size]
            for top in (row * stride[1] for row in range(layout.rows))
            for left in (column * stride[0] for column in range(layout.columns))
        ]
    )


def join_tiles(grid: Tensor, layout: TileLayout, make_thumbnail: Callable[[], Image.Image]) -> Tensor:
    """Put the thumbnail, if the layout has one, before or behind the tiles of the grid."""
    if not layout.has_thumbnail:
        return grid
    thumbnail = torch.from_numpy(numpy.array(make_thumbnail())).permute(2, 0, 1).unsqueeze(0)
    return torch.cat([thumbnail, grid] if layout.thumbnail_first else [grid, thumbnail])


def fitted_size(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Return the largest size of an image's aspect ratio that fits a canvas; each side is 1 pixel or more."""
    if canvas_width * height <= canvas_height * width:
        return canvas_width, max(1, round(canvas_width * height / width))
    return max(1, round(canvas_height * width / height)), canvas_height


def padded_canvas(image: Image.Image, canvas_width: int, canvas_height: int, color: Color) -> Image.Image:
    """Resize an image to fit a canvas and lay it on its middle; the rest has one colour."""
    size = fitted_size(*image.size, canvas_width, canvas_height)
    canvas = Image.new("RGB", (canvas_width, canvas_height), color)
    canvas.paste(
        image.resize(size, Image.Resampling.BICUBIC), ((canvas_width - size[0]) // 2, (canvas_height - size[1]) // 2)
    )
    return canvas
