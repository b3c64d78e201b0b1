"""Tilings: the published choice of the grid, pixel-exact tiles, the ladder."""

import itertools

import numpy
import pydantic
import pytest
import torch
from PIL import Image

from megavlm.data import TILINGS, TileLayout, TilingConfig
from megavlm.data.tilings.dynamic import DynamicTilingConfig, candidate_grids


def published_grid(width: int, height: int, tile_size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """The rule as published, by brute force: of the grids nearest in ratio, the last in order of size of which the
    image has more than half the pixels; else the first."""
    grids = [
        (i, j)
        for area in range(min_tiles, max_tiles + 1)
        for i in range(1, max_tiles + 1)
        for j in range(1, max_tiles + 1)
        if i * j == area
    ]
    distances = numpy.abs(width / height - numpy.array([i / j for i, j in grids]))
    nearest = [grid for grid, distance in zip(grids, distances, strict=True) if distance == distances.min()]
    large_enough = [(i, j) for i, j in nearest if width * height > 0.5 * tile_size**2 * i * j]
    return large_enough[-1] if large_enough else nearest[0]


def grid_of(layout: TileLayout) -> tuple[int, int]:
    return layout.columns, layout.rows


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 6, 9, 12, 24])
def test_grids_equal_the_published_rule(max_tiles: int) -> None:
    tiling = DynamicTilingConfig(max_tiles=max_tiles).build(448)
    draw = numpy.random.default_rng(max_tiles)
    sizes = [tuple(int(side) for side in numpy.exp(draw.uniform(0, 9, 2))) for _ in range(700)]
    # Sizes whose ratio lies exactly at a grid's, or exactly between two grids': ties.
    ratios = [(i, j) for i in range(1, 13) for j in range(1, 13)]
    sizes += [(i * scale, j * scale) for i, j in ratios for scale in (1, 50, 126, 211, 448)]
    sizes += [(5 * scale, 12 * scale) for scale in range(1, 300, 7)] + [(3 * s, 4 * s) for s in range(1, 300, 7)]
    for width, height in sizes:
        expected = published_grid(width, height, 448, 1, max_tiles)
        assert grid_of(tiling.layout(width, height)) == expected, (width, height)


@pytest.mark.parametrize(("min_tiles", "max_tiles"), [(2, 6), (4, 9), (4, 16), (3, 3)])
def test_grids_with_a_least_number_of_tiles(min_tiles: int, max_tiles: int) -> None:
    tiling = DynamicTilingConfig(min_tiles=min_tiles, max_tiles=max_tiles).build(448)
    for width in range(50, 3000, 97):
        for height in range(40, 3000, 131):
            layout = tiling.layout(width, height)
            assert grid_of(layout) == published_grid(width, height, 448, min_tiles, max_tiles)
            assert min_tiles <= layout.columns * layout.rows <= max_tiles


def test_the_order_of_equally_large_grids_cannot_matter() -> None:
    """The published code leaves that order to a Python set; two neighbouring ratios never come from one size."""
    for max_tiles in range(1, 41):
        sizes_of_ratio: dict[float, set[int]] = {}
        for columns, rows in candidate_grids(1, max_tiles):
            sizes_of_ratio.setdefault(columns / rows, set()).add(columns * rows)
        ordered = [sizes_of_ratio[ratio] for ratio in sorted(sizes_of_ratio)]
        assert all(left.isdisjoint(right) for left, right in itertools.pairwise(ordered))


@pytest.mark.parametrize(("max_tiles", "count"), [(1, 1), (6, 14), (12, 35)])
def test_number_of_grids(max_tiles: int, count: int) -> None:
    grids = candidate_grids(1, max_tiles)
    assert len(set(grids)) == len(grids) == count


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((633, 633), 6, (1, 1)),  # 2 x 2 ties and needs more than 2 * 448 * 448 = 401,408 pixels: 633^2 = 400,689
        ((634, 634), 6, (2, 2)),
        ((950, 950), 9, (2, 2)),  # 3 x 3 needs more than 903,168 pixels: 950^2 = 902,500
        ((951, 951), 9, (3, 3)),
        ((1000, 800), 6, (3, 2)),  # 1.25 lies exactly between 1 and 1.5; 800,000 > 602,112
        ((500, 400), 6, (1, 1)),
        ((1, 10_000), 6, (1, 6)),
        ((10_000, 1), 6, (6, 1)),
        ((896, 448), 6, (2, 1)),
    ],
)
def test_grids_worked_by_hand(size: tuple[int, int], max_tiles: int, grid: tuple[int, int]) -> None:
    assert grid_of(DynamicTilingConfig(max_tiles=max_tiles).build(448).layout(*size)) == grid


@pytest.mark.parametrize(
    ("size", "use_thumbnail", "layout", "num_tiles"),
    [
        ((896, 448), True, TileLayout(2, 1, True), 3),
        ((896, 448), False, TileLayout(2, 1, False), 2),
        ((448, 448), True, TileLayout(1, 1, False), 1),
    ],
)
def test_a_thumbnail_needs_two_tiles(
    size: tuple[int, int], use_thumbnail: bool, layout: TileLayout, num_tiles: int
) -> None:
    chosen = DynamicTilingConfig(use_thumbnail=use_thumbnail).build(448).layout(*size)
    assert chosen == layout
    assert chosen.num_tiles == num_tiles


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(7).integers(0, 256, (height, width, 3), "uint8"))


@pytest.mark.parametrize("size", [(50, 30), (31, 97), (16, 16), (3, 200), (1, 1)])
def test_tiles_are_the_crops_of_one_resize(size: tuple[int, int]) -> None:
    """Against Pillow's own crop of Pillow's own resize, tile by tile."""
    tiling = DynamicTilingConfig(max_tiles=12).build(16)
    image = noise(*size)
    layout = tiling.layout(*size)
    tiles = tiling.cut(image, layout)
    assert tiles.shape == (layout.num_tiles, 3, 16, 16)
    assert tiles.dtype == torch.uint8
    stretched = image.resize((16 * layout.columns, 16 * layout.rows), Image.Resampling.BICUBIC)
    for index in range(layout.columns * layout.rows):
        left, top = 16 * (index % layout.columns), 16 * (index // layout.columns)
        crop = torch.from_numpy(numpy.array(stretched.crop((left, top, left + 16, top + 16))))
        assert torch.equal(tiles[index], crop.permute(2, 0, 1))
    if layout.has_thumbnail:
        thumbnail = torch.from_numpy(numpy.array(image.resize((16, 16), Image.Resampling.BICUBIC)))
        assert torch.equal(tiles[-1], thumbnail.permute(2, 0, 1))


def test_an_image_of_the_grid_s_size_is_only_cut() -> None:
    pixels = numpy.arange(8 * 12 * 3, dtype="uint8").reshape(8, 12, 3)
    tiling = DynamicTilingConfig(max_tiles=6, use_thumbnail=False).build(4)
    layout = tiling.layout(12, 8)
    assert grid_of(layout) == (3, 2)
    tiles = tiling.cut(Image.fromarray(pixels), layout)
    assert numpy.array_equal(tiles[0].permute(1, 2, 0), pixels[:4, :4])
    assert numpy.array_equal(tiles[1].permute(1, 2, 0), pixels[:4, 4:8])
    assert numpy.array_equal(tiles[3].permute(1, 2, 0), pixels[4:, :4])


def test_whole_gives_one_stretched_tile() -> None:
    tiling = TILINGS["whole"]().build(16)
    layout = tiling.layout(300, 20)
    assert layout == TileLayout(1, 1, False)
    expected = numpy.array(noise(300, 20).resize((16, 16), Image.Resampling.BICUBIC))
    assert numpy.array_equal(tiling.cut(noise(300, 20), layout)[0].permute(1, 2, 0), expected)


def test_the_ladder_is_walked_to_its_end() -> None:
    tiling = DynamicTilingConfig(max_tiles=12).build(448)
    layout, seen = tiling.layout(4000, 3000), []
    while layout is not None:
        seen.append(grid_of(layout))
        layout = tiling.degrade(layout, 4000, 3000)
    # 4:3 is nearest 4 x 3; of 8: 4 x 3 = 1.33 is nearest 3 x 2 (1.5); of 4: 1 (2 x 2, the image is large); 1 x 1 of 2.
    assert seen == [(4, 3), (3, 2), (2, 2), (1, 1)]


def test_a_step_down_from_between_the_ladder_s_steps() -> None:
    tiling = DynamicTilingConfig(max_tiles=12).build(448)
    # From 10 the next step is 8: 2.5 lies between 2 x 1, 3 x 1 and 4 x 2; the image has pixels enough for the last.
    assert tiling.degrade(TileLayout(5, 2, True), 2500, 1000) == TileLayout(4, 2, True)


@pytest.mark.parametrize("kind", list(TILINGS))
def test_degrading_always_ends(kind: str) -> None:
    tiling = TILINGS[kind]().build(448)
    for size in [(100, 100), (2000, 1000), (1000, 3000), (5000, 50)]:
        layout = tiling.layout(*size)
        for _ in range(10):
            smaller = tiling.degrade(layout, *size)
            if smaller is None:
                break
            assert smaller.num_tiles < layout.num_tiles
            layout = smaller
        else:
            pytest.fail("did not end")


def test_degrading_stops_at_min_tiles() -> None:
    tiling = DynamicTilingConfig(min_tiles=4, max_tiles=9).build(448)
    four = tiling.degrade(TileLayout(3, 2, True), 1344, 896)
    assert four is not None
    assert four.columns * four.rows == 4
    assert tiling.degrade(four, 1344, 896) is None


def test_min_above_max_is_refused() -> None:
    with pytest.raises(ValueError, match="min_tiles=7: is above max_tiles=6"):
        DynamicTilingConfig(min_tiles=7)


def test_every_kind_is_in_the_union() -> None:
    adapter = pydantic.TypeAdapter(TilingConfig)
    for kind, config_class in TILINGS.items():
        assert isinstance(adapter.validate_python({"kind": kind}), config_class)
