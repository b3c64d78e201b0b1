"""The tilings: how an image becomes square tiles. One file per kind, and the dict of kinds."""

from typing import Annotated, Protocol

import pydantic
from PIL import Image
from torch import Tensor

from megavlm.config import Config
from megavlm.data.tilings.catty import CattyTilingConfig
from megavlm.data.tilings.dynamic import DynamicTiling, DynamicTilingConfig
from megavlm.data.tilings.layout import Box, TileLayout
from megavlm.data.tilings.mm1_5 import Mm15TilingConfig
from megavlm.data.tilings.square import SquareTilingConfig
from megavlm.data.tilings.static import StaticTilingConfig
from megavlm.data.tilings.whole import WholeTiling, WholeTilingConfig


class Tiling(Protocol):
    """What every tiling offers. A layout is chosen from an image's size alone; pixels are read only by ``cut``."""

    @property
    def tile_size(self) -> int:
        """Side of a tile, in pixels."""

    @property
    def max_tiles(self) -> int:
        """Most tiles of one image, the thumbnail not counted."""

    def layout(self, width: int, height: int) -> TileLayout:
        """Choose the layout of an image of ``width`` by ``height`` pixels."""

    def degrade(self, layout: TileLayout, width: int, height: int) -> TileLayout | None:
        """Return the next smaller layout of the image; ``None`` where ``layout`` is the smallest."""

    def boxes(self, layout: TileLayout, width: int, height: int) -> list[Box]:
        """Which part of an image of that size each tile shows, in the order of the tiles."""

    def cut(self, image: Image.Image, layout: TileLayout) -> Tensor:
        """Cut an RGB image: ``[num_tiles, 3, tile_size, tile_size]`` uint8, in the order of ``layout.cells()``.

        Every tiling also cuts the layout of a single tile: the whole image.
        """


class TilingKind(Protocol):
    """What the config class of each kind offers."""

    kind: str

    def build(self, tile_size: int) -> Tiling:
        """Make the tiling for square tiles of ``tile_size`` pixels."""


TILINGS: dict[str, type[Config]] = {
    "dynamic": DynamicTilingConfig,
    "whole": WholeTilingConfig,
    "square": SquareTilingConfig,
    "static": StaticTilingConfig,
    "mm1_5": Mm15TilingConfig,
    "catty": CattyTilingConfig,
}

TilingConfig = Annotated[
    DynamicTilingConfig
    | WholeTilingConfig
    | SquareTilingConfig
    | StaticTilingConfig
    | Mm15TilingConfig
    | CattyTilingConfig,
    pydantic.Field(discriminator="kind"),
]

__all__ = [
    "TILINGS",
    "Box",
    "CattyTilingConfig",
    "DynamicTiling",
    "DynamicTilingConfig",
    "Mm15TilingConfig",
    "SquareTilingConfig",
    "StaticTilingConfig",
    "TileLayout",
    "Tiling",
    "TilingConfig",
    "TilingKind",
    "WholeTiling",
    "WholeTilingConfig",
]
