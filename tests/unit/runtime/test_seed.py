"""Seeds of every generator."""

import random

import numpy as np
import pytest
import torch
from harness import run_ranks
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megavlm.runtime.seed import set_seed


def test_the_same_seed_draws_the_same_numbers() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        set_seed(seed)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    assert draw(3) == draw(3)
    assert all(one != other for one, other in zip(draw(3), draw(4), strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}: must lie between 0 and 4294901760"):
        set_seed(seed)


def _draw_on(tp: int, pp: int) -> tuple[float, float]:
    """A number from the default stream, and one from the tensor-parallel stream."""
    parallel_state.initialize_model_parallel(tp, pp)
    set_seed(5)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(1).item()
    return torch.rand(1).item(), forked


def test_streams_differ_where_they_must() -> None:
    (default_0, forked_0), (default_1, forked_1) = run_ranks(_draw_on, 2, 2, 1)
    assert default_0 == default_1  # tensor-parallel ranks share all but the tracker's stream
    assert forked_0 != forked_1
    (default_0, forked_0), (default_1, forked_1) = run_ranks(_draw_on, 2, 1, 2)
    assert default_0 != default_1  # equal layers of two pipeline stages must not start equal
    assert forked_0 != forked_1
