"""The batch contract."""

import dataclasses
import random

import pytest
import torch

from megavlm.batch import Batch, SkippedSample


def make_batch() -> Batch:
    return Batch(
        tokens=torch.arange(1, 9).view(2, 4),
        labels=torch.arange(2, 10).view(2, 4),
        loss_mask=torch.ones(2, 4),
        position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]),
        cu_seqlens=torch.tensor([0, 2, 4, 8], dtype=torch.int32),
        tiles=torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        tiles_per_image=torch.tensor([1]),
        visible_tiles=torch.ones(2, 4, 2, dtype=torch.int64),
    )


def with_context(tile_rows: list[int], tile_context: list[int], visible: list[list[list[int]]]) -> Batch:
    """A batch with these tiles in the contexts of its rows; ``visible`` has a row of tile ranges for each row."""
    visible_tiles = torch.tensor(visible)
    num_rows, num_tokens, _ = visible_tiles.shape
    tokens = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
    per_row = [
        sum(room for row, room in zip(tile_rows, tile_context, strict=True) if row == n) for n in range(num_rows)
    ]
    return Batch(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.zeros(num_rows, num_tokens),
        position_ids=torch.arange(num_tokens).repeat(num_rows, 1),
        cu_seqlens=torch.arange(num_rows + 1, dtype=torch.int32) * num_tokens,
        tiles=torch.zeros(len(tile_rows), 3, 2, 2, dtype=torch.uint8),
        tiles_per_image=torch.tensor([len(tile_rows)]),
        visible_tiles=visible_tiles,
        tile_rows=torch.tensor(tile_rows, dtype=torch.int64),
        tile_context=torch.tensor(tile_context, dtype=torch.int64),
        tile_tags=torch.full((len(tile_rows), 2), -1),
        context_length=max(1, *per_row),
    )


def test_packed_rows_are_known_by_their_boundaries() -> None:
    batch = make_batch()
    assert batch.is_packed
    batch.cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    assert not batch.is_packed


def test_padding_trains_nothing_and_keeps_what_was_there() -> None:
    batch = make_batch()
    padded = batch.padded_to(7)
    assert padded.tokens.shape == (2, 7)
    assert torch.equal(padded.tokens[:, :4], batch.tokens)
    assert padded.loss_mask[:, 4:].sum() == 0
    assert padded.cu_seqlens.tolist() == [0, 2, 7, 14]
    assert padded.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert padded.visible_tiles[:, 4:].sum() == 0
    assert batch.padded_to(4) is batch


def test_tokens_have_the_source_of_their_sample_and_padding_that_of_the_last() -> None:
    batch = make_batch()
    assert batch.source_of_tokens().tolist() == [[0] * 4] * 2, "one source need not be given"
    batch.sources = torch.tensor([2, 0, 1])
    assert batch.sample_of_tokens().tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]
    assert batch.source_of_tokens().tolist() == [[2, 2, 0, 0], [1, 1, 1, 1]]
    assert batch.padded_to(5).source_of_tokens().tolist() == [[2, 2, 0, 0, 0], [1] * 5]


@pytest.mark.parametrize("length", [4, 7])
def test_a_longer_context_is_seen_by_no_token(length: int) -> None:
    visible = [[[0, 0], [0, 1], [0, 2], [1, 2]], [[2, 2], [2, 3], [2, 3], [3, 3]]]
    batch = with_context([0, 0, 1], [3, 2, 4], visible)
    padded = batch.padded_to(length, context_length=8)
    assert (padded.context_length, padded.tokens.shape) == (8, (2, length))
    nothing = [[0, 0]] * (length - 4)
    assert padded.visible_context().tolist() == [
        [[0, 0], [0, 3], [0, 5], [3, 5], *nothing],
        [[0, 0], [0, 4], [0, 4], [0, 0], *nothing],
    ]
    assert torch.equal(padded.context_spans(), batch.context_spans())
    assert (batch.context_length, batch.tokens.shape) == (5, (2, 4))
    assert batch.padded_to(4, context_length=5) is batch


def test_a_batch_without_context_gets_none() -> None:
    batch = make_batch()
    assert batch.padded_to(7, context_length=0).context_length == 0
    with pytest.raises(AssertionError):
        batch.padded_to(7, context_length=4)


def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = with_context([0, 1], [3, 4], [[[0, 1]], [[1, 2]]])
    batch.skipped, batch.num_degraded = [SkippedSample("rows.jsonl:3", "over_length", "too long")], 2
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in moved.tensors().items()} == described
    plain = batch.values()
    assert moved.values() == plain
    assert (plain["context_length"], plain["skipped"], plain["num_degraded"]) == (4, batch.skipped, 2)
    assert len(described) + len(plain) == len(dataclasses.fields(Batch))


def test_each_tile_has_its_place_in_the_context_of_its_row() -> None:
    """Row 0 has a tile among the tokens between two of the context, row 1 none, row 2 begins at 0 again."""
    batch = with_context([0, 0, 0, 2, 2], [3, 0, 2, 0, 4], [[[0, 0]]] * 3)
    assert batch.context_spans().tolist() == [[0, 3], [3, 3], [3, 5], [0, 0], [0, 4]]


@pytest.mark.parametrize(
    ("row", "tiles", "context"),
    [
        (0, [0, 1], [0, 3]),
        (0, [0, 3], [0, 5]),
        (0, [0, 2], [0, 3]),
        (0, [1, 3], [3, 5]),
        (0, [2, 3], [3, 5]),
        (0, [1, 2], [0, 0]),  # only a tile among the tokens
        (0, [0, 0], [0, 0]),
        (0, [2, 2], [0, 0]),
        (1, [3, 3], [0, 0]),
        (2, [3, 5], [0, 4]),
        (2, [4, 5], [0, 4]),
        (2, [3, 4], [0, 0]),
        (2, [5, 5], [0, 0]),  # behind the last tile
    ],
)
def test_what_a_token_sees_of_the_context(row: int, tiles: list[int], context: list[int]) -> None:
    visible = [[[0, 0]], [[0, 0]], [[0, 0]]]
    visible[row] = [tiles]
    batch = with_context([0, 0, 0, 2, 2], [3, 0, 2, 0, 4], visible)
    expected = [[[0, 0]], [[0, 0]], [[0, 0]]]
    expected[row] = [context]
    assert batch.visible_context().tolist() == expected


def test_without_tiles_nothing_is_seen() -> None:
    batch = with_context([], [], [[[0, 0], [0, 0]], [[0, 0], [0, 0]]])
    assert batch.context_spans().shape == (0, 2)
    assert batch.visible_context().tolist() == [[[0, 0]] * 2] * 2


def test_the_range_holds_exactly_the_visible_tiles_of_the_row() -> None:
    """Against lists: for each position of each row's context, the tile that stands there."""
    draw = random.Random(3)
    for _ in range(50):
        rows = [[draw.choice([0, 1, 4]) for _ in range(draw.randrange(5))] for _ in range(3)]
        tile_rows = [number for number, row in enumerate(rows) for _ in row]
        tile_context = [room for row in rows for room in row]
        owners: list[list[int]] = [[], [], []]
        for tile, (row, room) in enumerate(zip(tile_rows, tile_context, strict=True)):
            owners[row] += [tile] * room
        firsts = [0, len(rows[0]), len(rows[0]) + len(rows[1])]
        visible = [
            [sorted(first + draw.randrange(len(row) + 1) for _ in range(2)) for _ in range(6)]
            for first, row in zip(firsts, rows, strict=True)
        ]
        batch = with_context(tile_rows, tile_context, visible)
        for row, ranges in enumerate(batch.visible_context().tolist()):
            for (start, stop), (first, after_last) in zip(ranges, visible[row], strict=True):
                seen = [place for place, tile in enumerate(owners[row]) if first <= tile < after_last]
                assert list(range(start, stop)) == seen
                assert seen or [start, stop] == [0, 0]
