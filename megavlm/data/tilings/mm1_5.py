"""Dynamic image splitting of MM1.5: the grid that wastes least, the aspect ratio kept, and an overview.

Source: MM1.5 (arXiv 2409.20566), equation 1 and its text. Not stated there, and chosen here: padding goes to both sides
alike, the overview is padded as the grid is, and of equally good grids the one with fewer tiles wins, then the one with
fewer columns.
"""

from typing import Literal

import pydantic
from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.dynamic import candidate_grids
from megavlm.data.tilings.layout import (
    MEAN_COLOR,
    WHOLE,
    Box,
    Color,
    OverviewPlace,
    TileLayout,
    crop_tiles,
    fitted_size,
    join_tiles,
    next_rung,
    padded_canvas,
)


class Mm15TilingConfig(Config):
    """A grid that the image fits with least padding, or else with least loss of resolution."""

    kind: Literal["mm1_5"] = "mm1_5"
    min_tiles: int = pydantic.Field(default=4, ge=1)
    """Fewest tiles of an image that is split, the overview not counted."""
    max_tiles: int = pydantic.Field(default=9, ge=1, le=64)
    """Most tiles of an image, the overview not counted. MM1.5: 9 in training, 16 in inference."""
    overview: OverviewPlace = "after"
    """Where the tile of the whole image stands; a grid of one tile has none."""
    padding_color: Color = MEAN_COLOR
    """Of what the image does not cover; 0 to 255."""

    @pydantic.model_validator(mode="after")
    def _check_range(self) -> "Mm15TilingConfig":
        if self.min_tiles > self.max_tiles:
            raise ValueError(
                f"min_tiles={self.min_tiles}: is above max_tiles={self.max_tiles}. Lower one or raise the other"
            )
        return self

    def build(self, tile_size: int) -> "Mm15Tiling":
        """Make the tiling for square tiles of ``tile_size`` pixels."""
        return Mm15Tiling(self, tile_size)


class Mm15Tiling:
    """See :class:`Mm15TilingConfig`."""

    def __init__(self, config: Mm15TilingConfig, tile_size: int) -> None:
        """List the grids; ``tile_size`` is the side of a tile, in pixels."""
        self.tile_size = tile_size
        self.max_tiles = config.max_tiles
        self._config = config
        self._grids = candidate_grids(config.min_tiles, config.max_tiles)

    def layout(self, width: int, height: int) -> TileLayout:
        """Choose the layout of an image of ``width`` by ``height`` pixels."""
        return self._layout_within(width, height, self.max_tiles)

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return the layout at the next step of the ladder; below ``min_tiles`` the whole image as one tile."""
        if layout.num_tiles == 1:
            return None
        limit = next_rung(layout.columns * layout.rows)
        if limit is None or limit < self._config.min_tiles:
            return WHOLE
        return self._layout_within(width, height, limit)

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """See :class:`megavlm.data.tilings.Tiling`."""
        canvas = (layout.columns * self.tile_size, layout.rows * self.tile_size)
        size = fitted_size(width, height, *canvas)

        def place(at: int, axis: int) -> int:
            inside = at - (canvas[axis] - size[axis]) // 2
            return min(max(0, inside), size[axis]) * (width, height)[axis] // size[axis]

        side = self.tile_size
        grid = [
            (
                place(column * side, 0),
                place(row * side, 1),
                place((column + 1) * side, 0),
                place((row + 1) * side, 1),
            )
            for row in range(layout.rows)
            for column in range(layout.columns)
        ]
        return layout.with_thumbnail(grid, (0, 0, width, height))

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """See :class:`megavlm.data.tilings.Tiling`."""
        side, color = self.tile_size, self._config.padding_color
        canvas = padded_canvas(image, layout.columns * side, layout.rows * side, color)
        grid = crop_tiles(canvas, layout, side, (side, side))
        return join_tiles(grid, layout, lambda: padded_canvas(image, side, side, color))

    def _layout_within(self, width: int, height: int, max_tiles: int) -> TileLayout:
        grids = [grid for grid in self._grids if grid[0] * grid[1] <= max_tiles]
        columns, rows = least_wasteful_grid(width, height, grids, self.tile_size)
        has_overview = self._config.overview != "none" and columns * rows > 1
        return TileLayout(columns, rows, has_overview, thumbnail_first=self._config.overview == "before")


def least_wasteful_grid(width: int, height: int, grids: list[tuple[int, int]], tile_size: int) -> tuple[int, int]:
    """Choose a grid for an image that is resized, its aspect ratio kept, until it fits.

    If the image fits some grids without being made smaller, the one of them that leaves least padding; otherwise the
    one on which the image keeps most pixels. Whole numbers only, so ties are exact.

    Args:
        width, height: image size in pixels.
        grids: ``(columns, rows)``; of equally good ones the first wins.
        tile_size: side of a tile, in pixels.

    Returns:
        ``(columns, rows)``.
    """
    num_pixels = width * height

    def scaled(grid: tuple[int, int]) -> int:
        """How often the image's side goes into the grid's, times ``num_pixels``."""
        return min(grid[0] * tile_size * height, grid[1] * tile_size * width)

    roomy = [grid for grid in grids if scaled(grid) >= num_pixels]
    if roomy:
        return min(roomy, key=lambda grid: grid[0] * grid[1] * tile_size**2 * num_pixels - scaled(grid) ** 2)
    return max(grids, key=scaled)
