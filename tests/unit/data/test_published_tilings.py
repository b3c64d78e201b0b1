"""Each tiling against its published rule, written down once more and in another way, on thousands of sizes."""

import math
import random
from fractions import Fraction

import numpy
import pytest
import torch
from PIL import Image

from megavlm.data.tilings import (
    TILINGS,
    CattyTilingConfig,
    Mm15TilingConfig,
    SquareTilingConfig,
    StaticTilingConfig,
    TileLayout,
    Tiling,
)
from megavlm.data.tilings.layout import WHOLE


def sizes(count: int, tile_size: int) -> list[tuple[int, int]]:
    """Random sizes from 1 pixel to 20,000, and those at which rules tie: ratios of grids, and one pixel beside them."""
    draw = random.Random(0)
    found = [tuple(int(math.exp(draw.uniform(0, 9.9))) for _ in range(2)) for _ in range(count)]
    for columns in range(1, 10):
        for rows in range(1, 10):
            for side in (1, 7, tile_size // 2, tile_size, 3 * tile_size):
                width, height = columns * side, rows * side
                found += [(width, height), (width + 1, height), (width, height + 1), (max(1, width - 1), height)]
    return [*found, (1, 1), (1, 20_000), (20_000, 1), (2, 20_000), (19_999, 20_000)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(7).integers(0, 256, (height, width, 3), "uint8"))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


# ---- MM1.5: equation 1, in fractions ---------------------------------------------------------------------------------


def mm1_5_grid(width: int, height: int, r: int, n_min: int, n_max: int) -> tuple[int, int]:
    """``(columns, rows)``: of grids that cover the image without making it smaller the one that pads least, else the
    one that keeps most of its resolution. Ties: fewer tiles, then fewer columns."""
    covering, shrinking = [], []
    for n_w in range(1, n_max + 1):
        for n_h in range(1, n_max + 1):
            if not n_min <= n_w * n_h <= n_max:
                continue
            scale = min(Fraction(n_w * r, width), Fraction(n_h * r, height))
            w_g, h_g = width * scale, height * scale
            if h_g >= height and w_g >= width:
                covering.append((n_h * n_w * r * r - h_g * w_g, n_w * n_h, n_w, n_h))
            else:
                shrinking.append((height * width - h_g * w_g, n_w * n_h, n_w, n_h))
    return min(covering or shrinking)[2:]


@pytest.mark.parametrize(("n_min", "n_max"), [(4, 9), (4, 16), (1, 9), (4, 4)])
def test_mm1_5_chooses_the_least_wasteful_grid(n_min: int, n_max: int) -> None:
    tiling = Mm15TilingConfig(min_tiles=n_min, max_tiles=n_max).build(672)
    for width, height in sizes(700, 672):
        layout = tiling.layout(width, height)
        expected = mm1_5_grid(width, height, 672, n_min, n_max)
        assert (layout.columns, layout.rows) == expected, (width, height)
        assert layout.has_thumbnail == (expected != (1, 1))
        assert not layout.thumbnail_first


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (2, 2)),  # 2 x 2 and 3 x 3 both pad nothing
        ((1344, 1344), (2, 2)),
        ((1345, 1345), (3, 3)),  # 2 x 2 would make it smaller
        ((2017, 2017), (3, 3)),  # all would; 3 x 3 least
        ((6048, 672), (9, 1)),
        ((672, 6048), (1, 9)),
        ((1344, 2016), (2, 3)),
        ((20_000, 10), (9, 1)),
    ],
)
def test_mm1_5_worked_by_hand(size: tuple[int, int], grid: tuple[int, int]) -> None:
    layout = Mm15TilingConfig().build(672).layout(*size)
    assert (layout.columns, layout.rows) == grid


def test_mm1_5_keeps_the_aspect_ratio_and_pads_both_sides() -> None:
    tiling = Mm15TilingConfig(padding_color=(1, 2, 3), overview="before", max_tiles=6).build(20)
    image = noise(30, 60)
    layout = tiling.layout(30, 60)
    assert layout == TileLayout(2, 3, True, thumbnail_first=True)  # 40 x 60: nothing smaller is wide and high enough
    tiles = tiling.cut(image, layout)
    color = torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1)
    canvas = torch.cat([torch.cat([tiles[1 + 2 * row], tiles[2 + 2 * row]], dim=2) for row in range(3)], dim=1)
    assert torch.equal(canvas[:, :, 5:35], pixels(image))  # fits as it is
    for column in [*range(5), *range(35, 40)]:
        assert (canvas[:, :, column] == color).all()
    overview = pixels(image.resize((10, 20), Image.Resampling.BICUBIC))
    assert torch.equal(tiles[0][:, :, 5:15], overview)
    assert (tiles[0][:, :, [*range(5), *range(15, 20)]] == color.unsqueeze(2)).all()
    assert tiling.boxes(layout, 30, 60)[1:3] == [(0, 0, 15, 20), (15, 0, 30, 20)]


def test_an_image_of_an_extreme_shape_keeps_a_pixel() -> None:
    for kind in TILINGS.values():
        tiling = kind().build(16)
        for size in [(20_000, 1), (1, 20_000), (1, 1)]:
            layout = tiling.layout(*size)
            assert tiling.cut(noise(*size), layout).shape == (layout.num_tiles, 3, 16, 16)


# ---- POINTS: CATTY ---------------------------------------------------------------------------------------------------


def catty_tiles(image: Image.Image, tile: int, most: int) -> tuple[tuple[int, int], list[Image.Image]]:
    """Grid and tiles by the rule of section 3.2 and the published code: a table of ratios, of which one side counts."""
    width, height = image.size
    ratio = width / height
    if ratio > most or ratio < 1 / most:
        shape = (most * height, height) if width > height else (width, most * width)
        image = image.resize(shape, Image.Resampling.BILINEAR)
        width, height = shape
        ratio = width / height
    table: dict[float, list[tuple[int, int]]] = {}
    for area in range(1, most + 1):
        for columns in range(1, area + 1):
            if area % columns == 0:
                table.setdefault(columns / (area // columns), []).append((columns, area // columns))
    keys = [key for key in table if ratio == 1 or (key <= ratio if ratio < 1 else key >= ratio)]
    nearest = sorted(keys, key=lambda key: abs(key - ratio))[0]
    wanted_area = (width / tile) * (height / tile)
    columns, rows = sorted(table[nearest], key=lambda grid: abs(grid[0] * grid[1] - wanted_area))[0]
    if width < height:
        resized = (columns * tile, int(height / width * (columns * tile)))
    else:
        resized = (int(width / height * (rows * tile)), rows * tile)
    image = image.resize(resized, Image.Resampling.BILINEAR)
    step_x = (resized[0] - tile) // (columns - 1) if columns > 1 else tile
    step_y = (resized[1] - tile) // (rows - 1) if rows > 1 else tile
    tiles = [
        image.crop((x, y, x + tile, y + tile))
        for y in range(0, resized[1] - tile + 1, step_y)
        for x in range(0, resized[0] - tile + 1, step_x)
    ]
    return (columns, rows), [*tiles, image.resize((tile, tile), Image.Resampling.BILINEAR)]


@pytest.mark.parametrize("most", [8, 12, 6])
def test_catty_chooses_the_published_grid(most: int) -> None:
    tiling = CattyTilingConfig(max_tiles=most).build(336)

    class Sized:  # an image of which only the size is asked
        def __init__(self, size: tuple[int, int]) -> None:
            self.size = size

        def resize(self, size: tuple[int, int], *_: object) -> "Sized":
            return Sized(size)

        def crop(self, box: tuple[int, ...]) -> "Sized":
            return Sized((box[2] - box[0], box[3] - box[1]))

    for width, height in sizes(1500, 336):
        layout = tiling.layout(width, height)
        grid, tiles = catty_tiles(Sized((width, height)), 336, most)
        assert (layout.columns, layout.rows) == grid, (width, height)
        assert layout.num_tiles == len(tiles), (width, height)


@pytest.mark.parametrize("size", [(1920, 1080), (100, 100), (500, 333), (60, 700), (33, 32), (4000, 30), (3, 300)])
def test_catty_cuts_the_published_tiles(size: tuple[int, int]) -> None:
    tiling = CattyTilingConfig().build(112)
    image = noise(*size)
    _, expected = catty_tiles(image, 112, 8)
    found = tiling.cut(image, tiling.layout(*size))
    assert torch.equal(found, torch.stack([pixels(tile) for tile in expected]))


def test_catty_overlaps_as_in_the_paper_s_example() -> None:
    """1920 x 1080: four columns and two rows on 1194 x 672 pixels, 286 from column to column."""
    tiling = CattyTilingConfig().build(336)
    layout = tiling.layout(1920, 1080)
    assert layout == TileLayout(4, 2, True)
    boxes = tiling.boxes(layout, 1920, 1080)
    assert [box[0] for box in boxes[:4]] == [286 * column * 1920 // 1194 for column in range(4)]
    assert boxes[4][1] == 540
    assert boxes[-1] == (0, 0, 1920, 1080)


# ---- LLaVA and MM1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 30), (31, 97), (16, 16), (3, 200), (201, 2), (1, 1)])
def test_square_is_llava_s_padding(size: tuple[int, int]) -> None:
    width, height = size
    side = max(size)
    square = numpy.empty((side, side, 3), "uint8")
    square[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = numpy.array(noise(*size))
    expected = Image.fromarray(square).resize((24, 24), Image.Resampling.BICUBIC)
    tiling = SquareTilingConfig().build(24)
    assert torch.equal(tiling.cut(noise(*size), tiling.layout(*size))[0], pixels(expected))


@pytest.mark.parametrize("overview", ["before", "after", "none"])
def test_static_is_an_overview_and_four_quarters(overview: str) -> None:
    tiling = StaticTilingConfig(overview=overview).build(24)
    image = noise(90, 50)
    large = image.resize((48, 48), Image.Resampling.BICUBIC)
    quarters = [pixels(large.crop((x, y, x + 24, y + 24))) for y in (0, 24) for x in (0, 24)]
    small = pixels(image.resize((24, 24), Image.Resampling.BICUBIC))
    expected = {"before": [small, *quarters], "after": [*quarters, small], "none": quarters}[overview]
    layout = tiling.layout(90, 50)
    assert torch.equal(tiling.cut(image, layout), torch.stack(expected))
    assert [layout.is_whole_image(tile) for tile in range(layout.num_tiles)] == [tile is small for tile in expected]
    for size in sizes(50, 24):
        assert tiling.layout(*size) == layout


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TILINGS))
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (400, 90)])
def test_boxes_are_where_the_pixels_come_from(kind: str, size: tuple[int, int]) -> None:
    """An image whose colours tell the place: red grows with x, green with y; padding is blue."""
    width, height = size
    ramp = numpy.zeros((height, width, 3), "uint8")
    ramp[..., 0] = numpy.linspace(0, 255, width)
    ramp[..., 1] = numpy.linspace(0, 255, height)[:, None]
    settings = {"padding_color": (0, 0, 255)} if "padding_color" in TILINGS[kind].model_fields else {}
    tiling: Tiling = TILINGS[kind](**settings).build(50)
    layout = tiling.layout(width, height)
    tiles, boxes = tiling.cut(Image.fromarray(ramp), layout), tiling.boxes(layout, width, height)
    assert len(boxes) == len(tiles) == layout.num_tiles
    for tile, (left, top, right, bottom) in zip(tiles.float(), boxes, strict=True):
        is_shown = tile[2] < 5
        for channel, (start, stop), side in ((0, (left, right), width), (1, (top, bottom), height)):
            levels, num_pixels = tile[channel][is_shown], int(is_shown.any(channel).sum())
            # Measured worst: 0.9 pixels of the tile, of rounding and of mixing with the padding at the image's border.
            a_pixel = 255 * (stop - start) / side / num_pixels
            assert levels.min() == pytest.approx(255 * start / side, abs=1 + 1.5 * a_pixel)
            assert levels.max() == pytest.approx(255 * stop / side, abs=1 + 1.5 * a_pixel)


@pytest.mark.parametrize("kind", list(TILINGS))
def test_every_tiling_cuts_the_whole_image_as_one_tile(kind: str) -> None:
    tiling = TILINGS[kind]().build(32)
    image = noise(64, 64)
    [tile] = tiling.cut(image, WHOLE)
    method = Image.Resampling.BILINEAR if kind == "catty" else Image.Resampling.BICUBIC
    assert torch.equal(tile, pixels(image.resize((32, 32), method)))


def test_the_ladder_of_mm1_5_ends_with_the_overview_alone() -> None:
    tiling = Mm15TilingConfig(max_tiles=16).build(672)
    layout, seen = tiling.layout(4000, 4000), []
    while layout is not None:
        seen.append((layout.columns, layout.rows, layout.has_thumbnail))
        layout = tiling.degrade(layout, 4000, 4000)
    assert seen == [(4, 4, True), (3, 3, True), (2, 2, True), (1, 1, False)]


def test_wrong_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tiles=10: is above max_tiles=9"):
        Mm15TilingConfig(min_tiles=10)
