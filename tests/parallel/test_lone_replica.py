"""With one data-parallel rank nothing is reduced or gathered over the replicas, whatever the overlap settings say."""

from typing import Any

import numpy as np
import pytest
from harness import run_ranks
from megatron.core.distributed import param_and_grad_buffer
from tiny_vlm import train_tiny

EVERYTHING = ("vision", "connector", "language")
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def count_collectives(engine_config: dict[str, Any]) -> list[str]:
    """On a rank: names of the collectives that megatron-core's buffers start in two steps."""
    started: list[str] = []
    names = ("dist_reduce_scatter_func", "dist_all_gather_func")
    originals = {name: getattr(param_and_grad_buffer, name) for name in names}

    def watch(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(param_and_grad_buffer, name, watch(name))
    try:
        train_tiny(engine_config, EVERYTHING, num_steps=2)
    finally:
        for name in names:
            setattr(param_and_grad_buffer, name, originals[name])
    return started


@pytest.mark.parametrize("overlap", [{}, OVERLAPPED])
def test_one_replica_starts_no_collective(overlap: dict[str, Any]) -> None:
    assert run_ranks(count_collectives, 1, overlap) == [[]]


def test_two_replicas_start_both() -> None:
    for started in run_ranks(count_collectives, 2, {}):
        assert set(started) == {"dist_reduce_scatter_func", "dist_all_gather_func"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distributed_optimizer_of_one_replica_gives_the_curve_of_a_plain_one(precision: str) -> None:
    config = {"precision": precision}
    [plain] = run_ranks(train_tiny, 1, {**config, "use_distributed_optimizer": False}, EVERYTHING, 3)
    for overlap in ({}, OVERLAPPED):
        [found] = run_ranks(train_tiny, 1, {**config, **overlap}, EVERYTHING, 3)
        np.testing.assert_array_equal(found.losses, plain.losses)
        assert found.losses[0] != found.losses[-1]
