"""The batch contract."""

import torch

from megavlm.batch import Batch


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


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = make_batch().to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert len(moved.tensors()) == 8
