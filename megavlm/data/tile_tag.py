"""The text that stands before each tile and says which part of the image it is.

Source: NVLM (arXiv 2409.11402) section 4.2 and Megatron-LM's ``_get_tile_tags``. Tags are ordinary text.
"""

from typing import Literal

from megavlm.data.tilings import TileLayout

TileTagStyle = Literal["none", "1d", "2d_grid", "2d_box"]


def tile_tags(
    style: TileTagStyle, layout: TileLayout, image_size: tuple[int, int], *, max_tiles: int, thumbnail_tag: str
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

    Args:
        style: one of the four.
        layout: the tiles.
        image_size: ``(width, height)`` of the original image, in pixels.
        max_tiles: most tiles of any image, the thumbnail not counted.
        thumbnail_tag: tag of the thumbnail, ``<tile_global_thumbnail>`` or ``<tile_global>``.

    Returns:
        ``layout.num_tiles`` strings; empty ones for ``none``.
    """
    if style == "none":
        return [""] * layout.num_tiles
    width, height = image_size
    cells = [(column, row) for row in range(layout.rows) for column in range(layout.columns)]
    if style == "1d":
        # Megatron-LM ends at 12 tiles; three digits from 100 on follow from the same rule.
        num_digits = len(str(max_tiles))
        whole = thumbnail_tag if num_digits == 1 else _lengthen(thumbnail_tag, num_digits - 1)
        tags = [f"<tile_{number:0{num_digits}d}>" for number in range(1, len(cells) + 1)]
    elif style == "2d_grid":
        whole = thumbnail_tag
        tags = [f"<tile_x{column}_y{row}>" for column, row in cells]
    else:
        whole = _box(0, 0, width, height)
        tags = [
            _box(
                column * width // layout.columns,
                row * height // layout.rows,
                (column + 1) * width // layout.columns,
                (row + 1) * height // layout.rows,
            )
            for column, row in cells
        ]
    if len(cells) == 1:
        return [whole]
    return [*tags, whole] if layout.has_thumbnail else tags


def _lengthen(tag: str, num_characters: int) -> str:
    zeros = "0" * num_characters
    return f"{tag[:-1]}{zeros}>" if tag.endswith(">") else tag + zeros


def _box(left: int, top: int, right: int, bottom: int) -> str:
    return f"<box> ({left}, {top}), ({right}, {bottom}) </box>"
