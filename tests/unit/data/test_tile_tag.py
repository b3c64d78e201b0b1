"""Tile tags: the exact strings of NVLM."""

import pytest

from megavlm.data import TileLayout
from megavlm.data.tile_tag import TileTagStyle, closing_text, tile_tags

GLOBAL = "<tile_global_thumbnail>"


def tags(style: TileTagStyle, layout: TileLayout, max_tiles: int = 6, thumbnail_tag: str = GLOBAL) -> list[str]:
    return tile_tags(style, layout, (1000, 700), max_tiles=max_tiles, thumbnail_tag=thumbnail_tag)


@pytest.mark.parametrize(
    ("style", "layout", "max_tiles", "expected"),
    [
        ("none", TileLayout(2, 1, True), 6, ["", "", ""]),
        ("none", TileLayout(1, 1, False), 6, [""]),
        ("1d", TileLayout(2, 2, True), 6, ["<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>", GLOBAL]),
        ("1d", TileLayout(2, 1, True), 9, ["<tile_1>", "<tile_2>", GLOBAL]),
        ("1d", TileLayout(2, 1, True), 10, ["<tile_01>", "<tile_02>", "<tile_global_thumbnail0>"]),
        ("1d", TileLayout(2, 1, True), 12, ["<tile_01>", "<tile_02>", "<tile_global_thumbnail0>"]),
        ("1d", TileLayout(2, 1, False), 6, ["<tile_1>", "<tile_2>"]),
        ("1d", TileLayout(1, 1, False), 6, [GLOBAL]),
        ("1d", TileLayout(1, 1, False), 12, ["<tile_global_thumbnail0>"]),
        (
            "2d_grid",
            TileLayout(2, 2, True),
            6,
            ["<tile_x0_y0>", "<tile_x1_y0>", "<tile_x0_y1>", "<tile_x1_y1>", GLOBAL],
        ),
        ("2d_grid", TileLayout(1, 1, False), 6, [GLOBAL]),
        (
            "2d_box",
            TileLayout(3, 1, True),
            6,
            [
                "<box> (0, 0), (333, 700) </box>",
                "<box> (333, 0), (666, 700) </box>",
                "<box> (666, 0), (1000, 700) </box>",
                "<box> (0, 0), (1000, 700) </box>",
            ],
        ),
        (
            "2d_box",
            TileLayout(1, 2, False),
            6,
            ["<box> (0, 0), (1000, 350) </box>", "<box> (0, 350), (1000, 700) </box>"],
        ),
        ("2d_box", TileLayout(1, 1, False), 6, ["<box> (0, 0), (1000, 700) </box>"]),
        ("1d", TileLayout(2, 1, True, thumbnail_first=True), 6, [GLOBAL, "<tile_1>", "<tile_2>"]),
        ("1d", TileLayout(1, 1, True), 6, ["<tile_1>", GLOBAL]),  # POINTS: a thumbnail behind a single tile
        ("index", TileLayout(2, 2, True), 6, ["(0, 1, 1)", "(0, 1, 2)", "(0, 2, 1)", "(0, 2, 2)", "(0, 0, 0)"]),
        ("index", TileLayout(1, 1, False), 6, ["(0, 0, 0)"]),
        ("separators", TileLayout(2, 2, True), 6, ["", ",", "<n>", ",", "<n>"]),
        ("separators", TileLayout(2, 2, True, thumbnail_first=True), 6, ["", ":", ",", "<n>", ","]),
        ("separators", TileLayout(1, 2, False), 6, ["", "<n>"]),
        ("separators", TileLayout(1, 1, False), 6, [""]),
    ],
)
def test_strings(style: TileTagStyle, layout: TileLayout, max_tiles: int, expected: list[str]) -> None:
    assert tags(style, layout, max_tiles) == expected


def test_twelve_tiles_and_the_other_thumbnail_tag() -> None:
    found = tags("1d", TileLayout(4, 3, True), 12, "<tile_global>")
    assert found == [f"<tile_0{n}>" for n in range(1, 10)] + ["<tile_10>", "<tile_11>", "<tile_12>", "<tile_global0>"]
    assert len({len(tag) for tag in found[:-1]}) == 1


def test_an_index_counts_the_images() -> None:
    layout = TileLayout(1, 2, False)
    found = tile_tags("index", layout, (10, 20), max_tiles=4, thumbnail_tag=GLOBAL, image_index=3)
    assert found == ["(3, 1, 1)", "(3, 2, 1)"]


def test_only_separators_close_an_image_and_only_behind_its_overview() -> None:
    assert closing_text("separators", TileLayout(2, 1, True)) == ":"
    for layout in (TileLayout(2, 1, True, thumbnail_first=True), TileLayout(2, 1, False), TileLayout(1, 1, False)):
        assert closing_text("separators", layout) == ""
    assert closing_text("index", TileLayout(2, 1, True)) == ""


def test_boxes_of_another_tiling_are_written() -> None:
    layout = TileLayout(2, 1, False)
    boxes = [(0, 0, 7, 10), (5, 0, 12, 10)]
    found = tile_tags("2d_box", layout, (12, 10), max_tiles=4, thumbnail_tag=GLOBAL, boxes=boxes)
    assert found == ["<box> (0, 0), (7, 10) </box>", "<box> (5, 0), (12, 10) </box>"]
