"""Tile tags: the exact strings of NVLM."""

import pytest

from megavlm.data import TileLayout
from megavlm.data.tile_tag import TileTagStyle, tile_tags

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
    ],
)
def test_strings(style: TileTagStyle, layout: TileLayout, max_tiles: int, expected: list[str]) -> None:
    assert tags(style, layout, max_tiles) == expected


def test_twelve_tiles_and_the_other_thumbnail_tag() -> None:
    found = tags("1d", TileLayout(4, 3, True), 12, "<tile_global>")
    assert found == [f"<tile_0{n}>" for n in range(1, 10)] + ["<tile_10>", "<tile_11>", "<tile_12>", "<tile_global0>"]
    assert len({len(tag) for tag in found[:-1]}) == 1
