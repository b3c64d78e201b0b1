"""One rank reads, all ranks of its replica get the same micro-batches; what cannot be read stops them all."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny_vlm import build_tiny, make_batch, make_routed_batch

from megavlm.batch import Batch, SkippedSample, TileRoute
from megavlm.engines.feed import Feed, is_reader


def steps(fail_at: int | None) -> Iterator[list[Batch]]:
    for step in range(3):
        if step == fail_at:
            raise ValueError("the disk is gone")
        batches = [
            make_batch([[2], []], seed=step),
            make_batch([[], []], seed=step + 10, length=24),
            make_routed_batch([[3], [2]], step, TileRoute("regular", "concatenate")),
        ]
        batches[0].skipped = [SkippedSample("rows.jsonl:7", "image_unreadable", "it is text")]
        batches[1].sources = torch.tensor([2, 1])
        yield batches


def receive(engine: dict[str, Any], fail_at: int | None) -> tuple[list[Any], str]:
    """What this rank gets of three steps, and the error that ended them."""
    build_tiny(engine)
    seen, error = [], ""
    try:
        for batches in Feed(steps(fail_at) if is_reader() else None):
            for batch in batches:
                fields = {name: tensor.sum().item() for name, tensor in batch.tensors().items() if name != "tiles"}
                shapes = (tuple(batch.tokens.shape), tuple(batch.tile_tags.shape), batch.context_length)
                seen.append((fields, shapes, len(batch.tiles), [s.key for s in batch.skipped]))
    except (ValueError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return seen, error


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
    ],
)
def test_all_ranks_of_a_replica_get_the_same(engine: dict[str, Any]) -> None:
    [(alone, _)] = run_ranks(receive, 1, {}, None)
    (first, _), (second, _) = run_ranks(receive, 2, engine, None)
    assert first == alone
    assert len(alone) == 9
    assert alone[2][1][2] > 0
    assert alone[1][0]["sources"] == 3
    has_pixels = "tensor_model_parallel_size" in engine
    for got, expected in zip(second, alone, strict=True):
        assert got[:2] == expected[:2]
        assert got[2] == (expected[2] if has_pixels else 0)  # pixels go to the first stage only
        assert got[3] == expected[3]


def test_an_error_of_the_reader_stops_every_rank() -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    outcomes = run_ranks(receive, 4, layout, 1, timeout=40)
    assert [len(seen) for seen, _ in outcomes] == [3, 3, 3, 3]
    assert outcomes[0][1] == "ValueError: the disk is gone"
    for _, error in outcomes[1:]:
        assert error == "RuntimeError: data: rank 0 could not read the next step: ValueError: the disk is gone"
