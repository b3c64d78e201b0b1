"""The three ways of an image's tiles into a model, from image files to samples and batches, written out by hand.

A chat with one image has 45 tokens of text: 13 before the image and 32 behind it (see ``BEHIND``). The tag ``<tile_1>``
has 8 tokens, ``<tile_global_thumbnail>`` 23, a tile 2.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_data import IMAGE, TILE_SIZE, TOKENS_PER_TILE, byte_ids, chat

from megavlm.batch import ALL_AMONG_TOKENS, TileRoute
from megavlm.data import DataConfig, Sample, SampleError, SampleProcessor, Tokenizer, collate, parse_conversation
from megavlm.data.expansion import TileTokens, route_tile

X = TileRoute(context_tiles="all", context_tags="text")
H = TileRoute(context_tiles="regular", context_tags="concatenate")
ADDING_H = TileRoute(context_tiles="regular", context_tags="add")
TAG = (7, 8, 9)

BEFORE = [2, *byte_ids("user\n<Image>")]
BEHIND = [*byte_ids("</Image>What?"), 3, *byte_ids("\n"), 2, *byte_ids("assistant\nCat."), 3, *byte_ids("\n")]
TAG_1, TAG_2, TAG_ALL = byte_ids("<tile_1>"), byte_ids("<tile_2>"), byte_ids("<tile_global_thumbnail>")

MakeRouted = Callable[..., SampleProcessor]
WriteImage = Callable[..., Path]


@pytest.fixture
def make_routed(byte_tokenizer: Tokenizer) -> MakeRouted:
    """A processor for a route, with 8-pixel tiles of 2 tokens; settings of :class:`DataConfig` by name."""

    def make(route: TileRoute, tokens_per_tile: int = TOKENS_PER_TILE, **settings: object) -> SampleProcessor:
        config = DataConfig.model_validate(
            {"train": {"kind": "jsonl", "path": "unused"}, "seq_length": 4096} | settings
        )
        return SampleProcessor(config, byte_tokenizer, TILE_SIZE, tokens_per_tile, route)

    return make


def conversation(*images: Path, question: str = "What?"):
    row = chat("<image>" * len(images) + question, "Cat.", [str(path) for path in images])
    return parse_conversation(row, "rows.jsonl:1", Path("/"))


def visible(sample: Sample) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in sample.visible_tiles.tolist()]


# ALL_AMONG_TOKENS is NVLM-D's.
@pytest.mark.parametrize(
    ("route", "is_whole_image", "expected"),
    [
        (ALL_AMONG_TOKENS, False, TileTokens(TAG, 5)),
        (ALL_AMONG_TOKENS, True, TileTokens(TAG, 5)),
        (X, False, TileTokens(TAG, 0, 5, ())),
        (X, True, TileTokens(TAG, 0, 5, ())),
        (H, False, TileTokens((), 0, 8, TAG)),
        (H, True, TileTokens(TAG, 5)),
        (ADDING_H, False, TileTokens((), 0, 5, TAG)),
        (ADDING_H, True, TileTokens(TAG, 5)),
        (TileRoute("regular", "text"), False, TileTokens(TAG, 0, 5, ())),
        (TileRoute("all", "concatenate"), True, TileTokens((), 0, 8, TAG)),
        (TileRoute("all", "add"), True, TileTokens((), 0, 5, TAG)),
    ],
)
def test_the_tokens_of_a_tile(route: TileRoute, is_whole_image: bool, expected: TileTokens) -> None:
    assert route_tile(TAG, 5, route, is_whole_image=is_whole_image) == expected
    without = route_tile((), 5, route, is_whole_image=is_whole_image)
    assert (without.tag_ids, without.context_tag_ids) == ((), ())
    assert without.num_image_tokens + without.context_length == 5


@pytest.mark.parametrize(("route", "uses_context"), [(ALL_AMONG_TOKENS, False), (X, True), (H, True), (ADDING_H, True)])
def test_which_routes_use_a_context(route: TileRoute, uses_context: bool) -> None:
    assert route.uses_context == uses_context


def test_all_tiles_in_the_context(make_routed: MakeRouted, write_image: WriteImage) -> None:
    sample = make_routed(X)("k", conversation(write_image("wide.png", 16, 8)))
    assert sample.tokens.tolist() == BEFORE + TAG_1 + TAG_2 + TAG_ALL + BEHIND
    assert visible(sample) == [(0, 0)] * 13 + [(0, 1)] * 8 + [(1, 2)] * 8 + [(2, 3)] * 23 + [(0, 3)] * 32
    assert sample.tile_context.tolist() == [2, 2, 2]
    assert sample.tile_tags.shape == (3, 0)
    assert sample.tile_spans.tolist() == [[21, 21], [29, 29], [52, 52]]
    assert sample.tokens_per_image == (8 + 8 + 23,)
    assert sample.tiles.shape == (3, 3, TILE_SIZE, TILE_SIZE)
    assert sample.labels[sample.loss_mask.bool()].tolist() == [*byte_ids("Cat."), 3, *byte_ids("\n")]


@pytest.mark.parametrize(("route", "tile_context"), [(H, [8 + 2, 8 + 2, 0]), (ADDING_H, [2, 2, 0])])
def test_the_thumbnail_among_the_tokens(
    make_routed: MakeRouted, write_image: WriteImage, route: TileRoute, tile_context: list[int]
) -> None:
    sample = make_routed(route)("k", conversation(write_image("wide.png", 16, 8)))
    assert sample.tokens.tolist() == [*BEFORE, *TAG_ALL, IMAGE, IMAGE, *BEHIND]
    assert visible(sample) == [(0, 0)] * 13 + [(2, 3)] * 23 + [(0, 3)] * 2 + [(0, 3)] * 32
    assert sample.tile_context.tolist() == tile_context
    assert sample.tile_tags.tolist() == [TAG_1, TAG_2, [-1] * 8]
    assert sample.tile_spans.tolist() == [[13, 13], [13, 13], [36, 38]]
    assert sample.tokens_per_image == (23 + 2,)
    assert sample.tiles_per_image.tolist() == [3]


@pytest.mark.parametrize("route", [H, ADDING_H])
def test_an_image_of_one_tile_is_a_thumbnail(
    make_routed: MakeRouted, write_image: WriteImage, route: TileRoute
) -> None:
    sample = make_routed(route)("k", conversation(write_image("one.png", 8, 8)))
    assert sample.tokens.tolist() == [*BEFORE, *TAG_ALL, IMAGE, IMAGE, *BEHIND]
    assert (sample.tile_context.tolist(), sample.tile_tags.shape) == ([0], (1, 0))
    batch = collate([sample], pad_id=0, tile_size=TILE_SIZE, uses_context=True)
    assert batch.visible_context().count_nonzero() == 0


def test_without_a_thumbnail_all_of_several_tiles_are_regular(make_routed: MakeRouted, write_image: WriteImage) -> None:
    processor = make_routed(H, tiling={"kind": "dynamic", "use_thumbnail": False})
    sample = processor("k", conversation(write_image("wide.png", 16, 8)))
    assert sample.tokens.tolist() == BEFORE + BEHIND
    assert visible(sample) == [(0, 0)] * 13 + [(0, 2)] * 32
    assert sample.tile_context.tolist() == [10, 10]


def test_tags_of_different_lengths_are_filled_up(make_routed: MakeRouted, write_image: WriteImage) -> None:
    sample = make_routed(H, tile_tags="2d_box")("k", conversation(write_image("wide.png", 16, 8)))
    first, second = byte_ids("<box> (0, 0), (8, 8) </box>"), byte_ids("<box> (8, 0), (16, 8) </box>")
    assert sample.tile_tags.tolist() == [[*first, -1], second, [-1] * 28]
    assert sample.tile_context.tolist() == [27 + 2, 28 + 2, 0]


@pytest.mark.parametrize(
    ("route", "image_tokens", "tile_context"),
    [(ALL_AMONG_TOKENS, 6, [0, 0, 0]), (X, 0, [2, 2, 2]), (H, 2, [2, 2, 0]), (ADDING_H, 2, [2, 2, 0])],
)
def test_no_tags(
    make_routed: MakeRouted, write_image: WriteImage, route: TileRoute, image_tokens: int, tile_context: list[int]
) -> None:
    sample = make_routed(route, tile_tags="none")("k", conversation(write_image("wide.png", 16, 8)))
    assert sample.tokens.tolist() == BEFORE + [IMAGE] * image_tokens + BEHIND
    assert sample.tile_context.tolist() == tile_context
    assert sample.tile_tags.shape == (3, 0)


# In one row: 2 regular tiles and a thumbnail, then a single tile, then 3 regular tiles and a thumbnail.
@pytest.mark.parametrize(
    ("route", "spans", "seen_by_question"),
    [
        (X, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 14), (14, 16)], [0, 16]),
        (H, [(0, 10), (10, 20), (20, 20), (20, 20), (20, 30), (30, 40), (40, 50), (50, 50)], [0, 50]),
        (ADDING_H, [(0, 2), (2, 4), (4, 4), (4, 4), (4, 6), (6, 8), (8, 10), (10, 10)], [0, 10]),
        (TileRoute("all", "text", "last_image"), [(2 * n, 2 * n + 2) for n in range(8)], [8, 16]),
        (
            TileRoute("regular", "add", "last_image"),
            [(0, 2), (2, 4), (4, 4), (4, 4), (4, 6), (6, 8), (8, 10), (10, 10)],
            [4, 10],
        ),
    ],
)
def test_several_images_in_the_context_of_their_row(
    make_routed: MakeRouted,
    write_image: WriteImage,
    route: TileRoute,
    spans: list[tuple[int, int]],
    seen_by_question: list[int],
) -> None:
    sizes = {"two.png": (16, 8), "one.png": (8, 8), "three.png": (24, 8)}
    paths = [write_image(name, *size) for name, size in sizes.items()]
    sample = make_routed(route)("k", conversation(*paths))
    assert sample.tiles_per_image.tolist() == [3, 1, 4]
    batch = collate([sample], pad_id=0, tile_size=TILE_SIZE, uses_context=True)
    assert [tuple(span) for span in batch.context_spans().tolist()] == spans
    assert batch.context_length == spans[-1][1]
    assert batch.tile_tags.shape == (8, 0 if route.context_tags == "text" else 8)
    seen = batch.visible_context()[0]
    assert seen[:13].count_nonzero() == 0  # nothing before the first image
    assert seen[-32:].tolist() == [seen_by_question] * 32


def test_a_tag_sees_its_own_tile_only(make_routed: MakeRouted, write_image: WriteImage) -> None:
    paths = [write_image("two.png", 16, 8), write_image("one.png", 8, 8)]
    sample = make_routed(X, image_wrapper="none")("k", conversation(*paths))
    batch = collate([sample, sample], pad_id=0, tile_size=TILE_SIZE, uses_context=True)
    own = [[0, 2]] * 8 + [[2, 4]] * 8 + [[4, 6]] * 23 + [[6, 8]] * 23
    for row in range(2):
        assert batch.visible_context()[row, 6 : 6 + 62].tolist() == own
    assert batch.visible_tiles[1, 6].tolist() == [4, 5]


def test_a_prompt_has_the_context_of_its_sample(make_routed: MakeRouted, write_image: WriteImage) -> None:
    path = write_image("wide.png", 16, 8)
    for route in (X, H, ADDING_H):
        processor = make_routed(route)
        prompt, sample = processor.prompt("k", conversation(path)).sample, processor("k", conversation(path))
        assert torch.equal(prompt.tokens, sample.tokens[: prompt.num_tokens])
        assert torch.equal(prompt.visible_tiles, sample.visible_tiles[: prompt.num_tokens])
        for name in ("tile_context", "tile_tags", "tiles", "tiles_per_image"):
            assert torch.equal(getattr(prompt, name), getattr(sample, name)), name


# Only the tags of 6 + 1, 4 + 1, 2 + 1 tiles and of 1 tile take room in the text.
@pytest.mark.parametrize(
    ("seq_length", "num_tiles", "num_degraded"),
    [
        (45 + 6 * 8 + 23, 7, 0),
        (45 + 6 * 8 + 22, 5, 1),
        (45 + 4 * 8 + 22, 3, 1),
        (45 + 2 * 8 + 22, 1, 1),
        (45 + 23, 1, 1),
    ],
)
def test_tiles_are_given_up_for_their_tags(
    make_routed: MakeRouted, write_image: WriteImage, seq_length: int, num_tiles: int, num_degraded: int
) -> None:
    sample = make_routed(X, seq_length=seq_length)("k", conversation(write_image("six.png", 24, 16)))
    assert (sample.tiles_per_image.tolist(), sample.num_degraded) == ([num_tiles], num_degraded)
    assert sample.tile_context.tolist() == [2] * num_tiles
    assert sample.num_tokens <= seq_length


# (route, settings, tokens of the sample, of which the image's, tiles, those in the context)
UNSHRINKABLE = [
    (X, {"tile_tags": "none"}, 45, 0, 7, 7),
    (H, {}, 45 + 25, 25, 7, 6),
    (ADDING_H, {}, 45 + 25, 25, 7, 6),
    # a single tile would even take more room in the text
    (H, {"tiling": {"kind": "dynamic", "use_thumbnail": False}}, 45, 0, 6, 6),
]


@pytest.mark.parametrize(("route", "settings", "num_tokens", "of_image", "num_tiles", "in_context"), UNSHRINKABLE)
def test_no_tile_is_given_up_where_that_makes_no_room(
    make_routed: MakeRouted,
    write_image: WriteImage,
    route: TileRoute,
    settings: dict[str, object],
    num_tokens: int,
    of_image: int,
    num_tiles: int,
    in_context: int,
) -> None:
    path = write_image("six.png", 24, 16)
    sample = make_routed(route, seq_length=num_tokens, **settings)("k", conversation(path))
    assert (sample.num_tokens, sample.tiles_per_image.tolist(), sample.num_degraded) == (num_tokens, [num_tiles], 0)
    assert int(sample.tile_context.count_nonzero()) == in_context
    with pytest.raises(SampleError) as caught:
        make_routed(route, seq_length=num_tokens - 1, **settings)("k", conversation(path))
    assert caught.value.skipped.reason == "over_length"
    assert f"{num_tokens} tokens (45 of text, {of_image} of 1 image(s)" in caught.value.skipped.message


def test_where_no_tile_has_to_fit_the_sequence_may_be_shorter_than_one(make_routed: MakeRouted) -> None:
    assert make_routed(X, tokens_per_tile=256, seq_length=64).route == X
    for route in (H, ADDING_H, ALL_AMONG_TOKENS):
        with pytest.raises(ValueError, match=r"data.seq_length=64: holds no whole tile; .* 256 tokens a tile"):
            make_routed(route, tokens_per_tile=256, seq_length=64)
