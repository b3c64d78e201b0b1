"""The text that stands before each tile and says which part of the image it is.

Source: NVLM (arXiv 2409.11402) section 4.2 and Megatron-LM's ``_get_tile_tags``; ``index`` and ``separators``: the
position indicators of MM1.5 (arXiv 2409.20566). Tags are ordinary text.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from megavlm.data.tilings import Box, TileLayout
from megavlm.data.tilings.layout import grid_boxes

TileTagStyle = Literal["none", "1d", "2d_grid", "2d_box", "index", "separators"]


def tile_tags(
    style: TileTagStyle,
    layout: TileLayout,
    image_size: tuple[int, int],
    *,
    max_tiles: int,
    thumbnail_tag: str,
    boxes: Sequence[Box] | None = None,
    image_index: int = 0,
) -> list[str]:
    """Return the tag of each tile of an image, in the order of the tiles.

    An image of a single tile gets what the thumbnail gets: the tile is the whole image.

    ``none``: no tags.
    ``1d``: ``<tile_1>`` ... and ``thumbnail_tag``. From ``max_tiles`` 10 on the numbers have two digits and the
    thumbnail's tag one more character (``<tile_01>``, ``<tile_global_thumbnail0>``), as Megatron-LM does to keep the
    tags equally long; it depends on the recipe's ``max_tiles``, not on the image.
    ``2d_grid``: ``<tile_x0_y0>``, ``<tile_x1_y0>`` ... (x the column, y the row, from 0) and ``thumbnail_tag``.
    ``2d_box``: ``<box> (x0, y0), (x1, y1) </box>``, left-top and right-bottom corner of the tile in pixels of the
    original image, rounded down. The paper names no tag for the thumbnail here; it gets the box of the whole image.
    ``index``: ``(k, i, j)``: the image's number in its sample from 0, row and column from 1; ``(k, 0, 0)`` for the
    thumbnail.
    ``separators``: ``,`` between columns, ``<n>`` between rows, and ``:`` behind the thumbnail
    (:func:`closing_text` where it is the last tile); nothing for an image of a single tile.

    Args:
        style: one of the six.
        layout: the tiles.
        image_size: ``(width, height)`` of the original image, in pixels.
        max_tiles: most tiles of any image, the thumbnail not counted.
        thumbnail_tag: tag of the thumbnail, ``<tile_global_thumbnail>`` or ``<tile_global>``.
        boxes: the part of the image that each tile shows; None: equal parts.
        image_index: number of the image in its sample.

    Returns:
        ``layout.num_tiles`` strings; empty ones for ``none``.
    """
    if style == "none":
        return [""] * layout.num_tiles
    cells = layout.cells()
    if style == "separators":
        return _separators(cells)
    if style == "2d_box":
        if len(cells) == 1:
            return [_box(0, 0, *image_size)]
        return [_box(*box) for box in boxes or grid_boxes(layout, *image_size)]
    # Megatron-LM ends at 12 tiles; three digits from 100 on follow from the same rule.
    num_digits = len(str(max_tiles))
    whole = thumbnail_tag
    if style == "1d" and num_digits > 1:
        whole = _lengthen(thumbnail_tag, num_digits - 1)
    tags = []
    for number, cell in enumerate(cells, start=0 if layout.thumbnail_first and layout.has_thumbnail else 1):
        if len(cells) == 1 or cell is None:
            tags.append(f"({image_index}, 0, 0)" if style == "index" else whole)
        elif style == "1d":
            tags.append(f"<tile_{number:0{num_digits}d}>")
        elif style == "2d_grid":
            tags.append(f"<tile_x{cell[0]}_y{cell[1]}>")
        else:
            tags.append(f"({image_index}, {cell[1] + 1}, {cell[0] + 1})")
    return tags


def closing_text(style: TileTagStyle, layout: TileLayout) -> str:
    """Return the text behind the last tile of an image; empty for most styles."""
    return ":" if style == "separators" and layout.num_tiles > 1 and layout.cells()[-1] is None else ""


def _separators(cells: Sequence[tuple[int, int] | None]) -> list[str]:
    """What stands between each tile and the one before it."""
    tags = [""]
    for before, cell in itertools.pairwise(cells):
        tags.append(":" if before is None else "<n>" if cell is None or cell[1] != before[1] else ",")
    return tags


def _lengthen(tag: str, num_characters: int) -> str:
    zeros = "0" * num_characters
    return f"{tag[:-1]}{zeros}>" if tag.endswith(">") else tag + zeros


def _box(left: int, top: int, right: int, bottom: int) -> str:
    return f"<box> ({left}, {top}), ({right}, {bottom}) </box>"
