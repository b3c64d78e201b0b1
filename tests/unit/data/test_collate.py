"""Batches: rows, padding, packed samples and rows of nothing."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from megavlm.batch import SkippedSample
from megavlm.data import Sample, collate, pack

SKIPPED = SkippedSample("rows.jsonl:3", "over_length", "too long")


def sample(
    num_tokens: int,
    tiles_per_image: tuple[int, ...] = (),
    fill: int = 7,
    tile_context: Sequence[int] | None = None,
    tile_tags: Sequence[Sequence[int]] = (),
) -> Sample:
    """Tokens ``fill * 100 + position``, of which the last two are trained; every token sees all of the tiles.

    ``tile_context`` and ``tile_tags`` have one entry for each tile (not given: no tile is in the context, no tags).
    """
    tokens = torch.arange(num_tokens) + fill * 100
    loss_mask = torch.zeros(num_tokens)
    loss_mask[-3:-1] = 1
    num_tiles = sum(tiles_per_image)
    return Sample(
        key=f"k{fill}",
        tokens=tokens,
        labels=tokens.roll(-1) * loss_mask.long(),
        loss_mask=loss_mask,
        visible_tiles=torch.tensor([[0, num_tiles]] * num_tokens),
        tile_spans=torch.zeros(num_tiles, 2, dtype=torch.int64),
        tile_context=torch.tensor(tile_context or [0] * num_tiles, dtype=torch.int64),
        tile_tags=torch.tensor(tile_tags, dtype=torch.int64).reshape(num_tiles, len(tile_tags[0]) if tile_tags else 0),
        tiles=torch.full((num_tiles, 3, 4, 4), fill, dtype=torch.uint8),
        tiles_per_image=torch.tensor(tiles_per_image, dtype=torch.int64),
        tokens_per_image=(),
    )


def test_each_sample_gets_a_row() -> None:
    batch = collate([sample(3, (2,), 1), sample(5, (), 2), sample(4, (1, 1), 3)], pad_id=9, tile_size=4, pad_multiple=4)
    assert batch.tokens.tolist() == [
        [100, 101, 102, 9, 9, 9, 9, 9],
        [200, 201, 202, 203, 204, 9, 9, 9],
        [300, 301, 302, 303, 9, 9, 9, 9],
    ]
    assert batch.labels.tolist() == [
        [101, 102, 0, 0, 0, 0, 0, 0],
        [0, 0, 203, 204, 0, 0, 0, 0],
        [0, 302, 303, 0, 0, 0, 0, 0],
    ]
    assert batch.loss_mask.tolist() == (batch.labels > 0).float().tolist()
    assert batch.position_ids.tolist() == [list(range(8))] * 3
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 24]
    assert batch.tiles[:, 0, 0, 0].tolist() == [1, 1, 3, 3]
    assert batch.tiles_per_image.tolist() == [2, 1, 1]
    assert batch.visible_tiles[0].tolist() == [[0, 2]] * 3 + [[2, 2]] * 5
    assert batch.visible_tiles[1].tolist() == [[2, 2]] * 8
    assert batch.visible_tiles[2].tolist() == [[2, 4]] * 4 + [[4, 4]] * 4
    assert not batch.is_packed
    assert batch.skipped == []


def test_the_types_are_those_of_the_contract() -> None:
    batch = collate([sample(3)], pad_id=9, tile_size=4)
    assert {name: tensor.dtype for name, tensor in batch.tensors().items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "tiles": torch.uint8,
        "tiles_per_image": torch.int64,
        "visible_tiles": torch.int64,
        "tile_rows": torch.int64,
        "tile_context": torch.int64,
        "tile_tags": torch.int64,
        "row_lengths": torch.int64,
        "sources": torch.int64,
    }
    assert batch.tiles.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("nothing", [SKIPPED, None])
def test_an_unusable_sample_is_an_empty_row(nothing: SkippedSample | None) -> None:
    whole = [sample(4, (1,), 1), sample(3, (2,), 2), sample(4, (3,), 3)]
    batch = collate([whole[0], nothing, whole[2]], pad_id=9, tile_size=4)
    assert batch.tokens[1].tolist() == [9, 9, 9, 9]
    assert batch.loss_mask[1].count_nonzero() == 0
    assert batch.labels[1].count_nonzero() == 0
    assert batch.tokens[2].tolist() == whole[2].tokens.tolist()
    assert batch.visible_tiles[2].tolist() == [[1, 4]] * 4
    assert batch.tiles_per_image.tolist() == [1, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert batch.skipped == ([SKIPPED] if nothing else [])


@pytest.mark.parametrize(("pad_multiple", "length"), [(1, 1), (8, 8)])
def test_a_batch_of_nothing(pad_multiple: int, length: int) -> None:
    batch = collate([SKIPPED, None], pad_id=9, tile_size=4, pad_multiple=pad_multiple)
    assert batch.tokens.tolist() == [[9] * length] * 2
    assert batch.loss_mask.sum() == 0
    assert batch.tiles.shape == (0, 3, 4, 4)
    assert batch.cu_seqlens.tolist() == [0, length, 2 * length]


@pytest.mark.parametrize(
    ("longest", "pad_multiple", "length"), [(5, 1, 5), (5, 5, 5), (5, 4, 8), (8, 4, 8), (3, 100, 100)]
)
def test_rows_are_rounded_up(longest: int, pad_multiple: int, length: int) -> None:
    batch = collate([sample(3), sample(longest)], pad_id=9, tile_size=4, pad_multiple=pad_multiple)
    assert batch.tokens.shape == (2, length)


def test_several_samples_in_a_row() -> None:
    rows = [[sample(3, (2,), 1), SKIPPED, sample(4, (1,), 2)], [sample(5, (), 3)], [None]]
    batch = pack(rows, pad_id=9, tile_size=4, pad_multiple=8)
    assert batch.tokens[0].tolist() == [100, 101, 102, 200, 201, 202, 203, 9]
    # The last position of a sample never predicts the first token of the next.
    assert batch.labels[0].tolist() == [101, 102, 0, 0, 202, 203, 0, 0]
    assert batch.loss_mask[0].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    # Padding is counted with the sample before it.
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 16, 24]
    assert batch.visible_tiles[0].tolist() == [[0, 2]] * 3 + [[2, 3]] * 4 + [[3, 3]]
    assert batch.visible_tiles[1].tolist() == [[3, 3]] * 8
    assert batch.tiles_per_image.tolist() == [2, 1]
    assert batch.is_packed
    assert batch.skipped == [SKIPPED]


def test_packed_and_unpacked_hold_the_same_samples() -> None:
    samples = [sample(4, (1,), 1), sample(6, (2, 1), 2), sample(3, (), 3)]
    packed, apart = pack([samples], pad_id=0, tile_size=4), collate(samples, pad_id=0, tile_size=4)
    assert torch.equal(packed.tiles, apart.tiles)
    starts = packed.cu_seqlens.tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        for name in ("tokens", "labels", "loss_mask", "position_ids", "visible_tiles"):
            expected = getattr(apart, name)[row, : stop - start]
            assert torch.equal(getattr(packed, name)[0, start:stop], expected), name


def test_each_sample_keeps_its_source() -> None:
    samples = [sample(4), sample(6), sample(3)]
    for number, one in enumerate(samples):
        one.source = number + 2
    packed = pack([[samples[0], SKIPPED, samples[1]], [None], [samples[2]]], pad_id=0, tile_size=4)
    assert packed.cu_seqlens.tolist() == [0, 4, 10, 20, 30]
    assert packed.sources.tolist() == [2, 3, 0, 4]
    apart = collate([samples[1], None, samples[0]], pad_id=0, tile_size=4)
    assert apart.sources.tolist() == [3, 0, 2]
    assert sample(4).source == 0


def test_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="rows=0: a batch needs at least one row"):
        collate([], pad_id=0, tile_size=4)


def test_tiles_know_their_row_and_their_room_in_its_context() -> None:
    samples = [
        sample(4, (2,), 1, tile_context=(5, 0), tile_tags=([6], [-1])),
        sample(3, (), 2),
        sample(4, (1, 2), 3, tile_context=(0, 6, 7), tile_tags=([-1, -1, -1], [6, 7, -1], [6, 7, 8])),
    ]
    batch = collate(samples, pad_id=9, tile_size=4, uses_context=True)
    assert batch.tile_rows.tolist() == [0, 0, 2, 2, 2]
    assert batch.tile_context.tolist() == [5, 0, 0, 6, 7]
    assert batch.tile_tags.tolist() == [[6, -1, -1], [-1] * 3, [-1] * 3, [6, 7, -1], [6, 7, 8]]
    assert batch.context_length == 6 + 7
    assert batch.context_spans().tolist() == [[0, 5], [5, 5], [0, 0], [0, 6], [6, 13]]
    assert batch.visible_context()[:, 0].tolist() == [[0, 5], [0, 0], [0, 13]]


def test_packed_samples_share_the_context_of_their_row() -> None:
    rows: list[list[Sample | SkippedSample | None]] = [
        [sample(3, (2,), 1, tile_context=(4, 2)), SKIPPED, sample(2), sample(3, (1,), 2, tile_context=(3,))],
        [None],
        [sample(3, (1,), 3, tile_context=(1,))],
    ]
    batch = pack(rows, pad_id=9, tile_size=4, pad_multiple=4, uses_context=True)
    assert batch.tile_rows.tolist() == [0, 0, 0, 2]
    assert batch.context_length == 12  # 4 + 2 + 3, rounded up
    assert batch.context_spans().tolist() == [[0, 4], [4, 6], [6, 9], [0, 1]]
    assert batch.visible_context().tolist() == [
        [[0, 6]] * 3 + [[0, 0]] * 2 + [[6, 9]] * 3,
        [[0, 0]] * 8,
        [[0, 1]] * 3 + [[0, 0]] * 5,
    ]


@pytest.mark.parametrize(
    ("longest", "pad_multiple", "length"),
    [(5, 1, 5), (5, 5, 5), (5, 4, 8), (8, 4, 8), (3, 100, 100), (0, 1, 1), (0, 4, 4)],
)
def test_contexts_are_rounded_up_and_never_empty(longest: int, pad_multiple: int, length: int) -> None:
    samples = [sample(3, (1,), tile_context=(min(longest, 2),)), sample(3, (1,), tile_context=(longest,))]
    batch = collate(samples, pad_id=9, tile_size=4, pad_multiple=pad_multiple, uses_context=True)
    assert batch.context_length == length


@pytest.mark.parametrize("nothing", [SKIPPED, None, sample(5)])
@pytest.mark.parametrize(("uses_context", "context_length"), [(True, 4), (False, 0)])
def test_a_batch_without_images_has_a_context_where_the_model_has_one(
    nothing: Sample | SkippedSample | None, uses_context: bool, context_length: int
) -> None:
    batch = collate([nothing, nothing], pad_id=9, tile_size=4, pad_multiple=4, uses_context=uses_context)
    assert batch.context_length == context_length
    assert (batch.tile_rows.shape, batch.tile_context.shape, batch.tile_tags.shape) == ((0,), (0,), (0, 0))
    assert batch.visible_context().tolist() == [[[0, 0]] * batch.tokens.shape[1]] * 2


def test_text_beside_images_leaves_the_tags_as_they_are() -> None:
    """A sample without tiles has no tags to fill up."""
    samples: list[Sample | SkippedSample] = [
        sample(3),
        sample(3, (2,), tile_context=(1, 1), tile_tags=([5, -1], [5, 6])),
        SKIPPED,
    ]
    batch = collate(samples, pad_id=9, tile_size=4, uses_context=True)
    assert batch.tile_tags.tolist() == [[5, -1], [5, 6]]
    assert batch.tile_rows.tolist() == [1, 1]
