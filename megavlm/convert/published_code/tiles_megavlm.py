"""Images as tiles, and the tag of each tile, as the model was trained on them.

This file travels inside exported folders: it needs numpy, Pillow, torch and transformers, and nothing else. Sources:
InternVL 1.5 (arXiv 2404.16821) ``dynamic_preprocess`` for the grid, NVLM (arXiv 2409.11402) section 4.2 for the tags.
"""

import base64
import binascii
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import load_image

# A sample that is too long goes down these numbers of tiles.
_LADDER = (12, 8, 6, 4, 2, 1)
# Formats whose orientation is applied; None: an image that is no longer what was read from a file.
_FORMATS_WITH_ORIENTATION = ("JPEG", "MPO", "WEBP", None)


@dataclass(frozen=True)
class Grid:
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
        """Whether a tile (from 0) shows the whole image."""
        return self.num_tiles == 1 or (self.has_thumbnail and tile == self.num_tiles - 1)


class Tiler:
    """Chooses grids, cuts images by them, names the tiles."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Take the settings of the processor: ``tile_size``, ``min_tiles``, ``max_tiles``, ``use_thumbnail`` ..."""
        self.tile_size = int(settings["tile_size"])
        self.max_tiles = int(settings["max_tiles"])
        self._min_tiles = int(settings["min_tiles"])
        self._use_thumbnail = bool(settings["use_thumbnail"])
        self._style = str(settings["tile_tags"])
        self._thumbnail_tag = str(settings["thumbnail_tag"])

    def grid(self, size: tuple[int, int], most: int | None = None) -> Grid:
        """Choose the grid whose aspect ratio is nearest the image's.

        Of grids equally near, a larger one wins only if the image has more than half of its pixels.

        Args:
            size: ``(width, height)`` in pixels.
            most: most tiles; None: what the settings allow.
        """
        width, height = size
        most = self.max_tiles if most is None else most
        grids = sorted(
            (
                (columns, rows)
                for columns in range(1, most + 1)
                for rows in range(1, most // columns + 1)
                if columns * rows >= self._min_tiles
            ),
            key=lambda grid: (grid[0] * grid[1], grid[0]),
        )
        best, least = grids[0], abs(width / height - grids[0][0] / grids[0][1])
        for columns, rows in grids[1:]:
            difference = abs(width / height - columns / rows)
            has_enough_pixels = width * height > 0.5 * self.tile_size * self.tile_size * columns * rows
            if difference < least or (difference == least and has_enough_pixels):
                best, least = (columns, rows), difference
        return Grid(*best, has_thumbnail=self._use_thumbnail and best[0] * best[1] > 1)

    def fewer(self, grid: Grid, size: tuple[int, int]) -> Grid | None:
        """The grid of the next step down; None where there is none."""
        for most in _LADDER:
            if most < grid.columns * grid.rows:
                return self.grid(size, most) if most >= self._min_tiles else None
        return None

    def cut(self, image: Image.Image, grid: Grid) -> Tensor:
        """Return ``[num_tiles, 3, tile_size, tile_size]`` uint8: row by row, the thumbnail last."""
        side = self.tile_size
        whole = image.resize((grid.columns * side, grid.rows * side), Image.Resampling.BICUBIC)
        cells = numpy.array(whole).reshape(grid.rows, side, grid.columns, side, 3)
        tiles = [torch.from_numpy(cells.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side))]
        if grid.has_thumbnail:
            thumbnail = numpy.array(image.resize((side, side), Image.Resampling.BICUBIC))
            tiles.append(torch.from_numpy(thumbnail).permute(2, 0, 1)[None])
        return torch.cat(tiles)

    def tags(self, grid: Grid, size: tuple[int, int]) -> list[str]:
        """The text before each tile; empty texts where the model knows none."""
        if self._style == "none":
            return [""] * grid.num_tiles
        width, height = size
        cells = [(column, row) for row in range(grid.rows) for column in range(grid.columns)]
        if self._style == "1d":
            digits = len(str(self.max_tiles))
            whole, zeros = self._thumbnail_tag, "0" * (digits - 1)
            whole = f"{whole[:-1]}{zeros}>" if whole.endswith(">") else whole + zeros
            tags = [f"<tile_{number:0{digits}d}>" for number in range(1, len(cells) + 1)]
        elif self._style == "2d_grid":
            whole = self._thumbnail_tag
            tags = [f"<tile_x{column}_y{row}>" for column, row in cells]
        else:
            whole = _box(0, 0, width, height)
            xs = [column * width // grid.columns for column in range(grid.columns + 1)]
            ys = [row * height // grid.rows for row in range(grid.rows + 1)]
            tags = [_box(xs[column], ys[row], xs[column + 1], ys[row + 1]) for column, row in cells]
        if len(cells) == 1:
            return [whole]
        return [*tags, whole] if grid.has_thumbnail else tags


def _box(left: int, top: int, right: int, bottom: int) -> str:
    return f"<box> ({left}, {top}), ({right}, {bottom}) </box>"


def open_image(source: Any) -> Image.Image:
    """Return an image as 8-bit RGB: upright, transparent parts on white, 16-bit greys scaled.

    Args:
        source: a path, a ``file:``, ``data:`` or web address, base64, a PIL image, or pixels ``[H, W, 3]`` uint8.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(source, str | os.PathLike):
        source = _read(os.fspath(source))
    elif not isinstance(source, Image.Image):
        pixels = numpy.asarray(source)
        if pixels.dtype != numpy.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"image: has shape {pixels.shape} of {pixels.dtype}; pixels must be [height, width, 3] of uint8. "
                "Give those, or a PIL image."
            )
        source = Image.fromarray(pixels)
    if source.format in _FORMATS_WITH_ORIENTATION:
        source = ImageOps.exif_transpose(source)
    if source.mode == "F":
        raise ValueError("image: holds floating-point greys, whose range is unknown. Save it with 8 bits.")
    if source.mode.startswith("I"):
        greys = numpy.clip(numpy.asarray(source).astype(numpy.int64), 0, 65535)
        source = Image.fromarray((greys // 257).astype(numpy.uint8))
    if source.has_transparency_data:
        source = source.convert("RGBA")
        source = Image.alpha_composite(Image.new("RGBA", source.size, (255, 255, 255, 255)), source)
    return source.convert("RGB")


def _read(source: str) -> Image.Image:
    """Open what a text names."""
    if source.startswith("data:"):
        try:
            return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        except binascii.Error as error:
            raise ValueError(f"image={source[:40]}...: is not valid base64 ({error}).") from None
    path = source.removeprefix("file://")
    return Image.open(path) if os.path.isfile(path) else load_image(source)
