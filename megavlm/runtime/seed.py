"""Seeds of every random number generator a run draws from."""

import random

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

_LARGEST_SEED = 2**32 - 2**16  # numpy takes 32 bits; megatron-core adds a few thousand for the ranks


def set_seed(seed: int) -> None:
    """Seed python, numpy, torch and, where megatron-core's groups exist, its RNG tracker.

    Every rank draws the same numbers outside the tracker, but for pipeline stages: weights of stage ``p`` come from
    ``seed + 100 * p`` (megatron-core's rule), or equal layers of two stages would start equal. The tracker's streams
    differ by tensor-parallel and expert rank where they must.

    On a CPU the tracker and ``torch.rand`` share one generator; code that must not disturb dropout draws from its own
    ``torch.Generator``.

    Raises:
        ValueError: ``seed`` is out of range.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"seed={seed}: must lie between 0 and {_LARGEST_SEED}. Choose another one.")
    stage = 0
    if parallel_state.model_parallel_is_initialized():
        stage = parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed + 100 * stage)
    np.random.seed(seed + 100 * stage)
    torch.manual_seed(seed + 100 * stage)
    if parallel_state.model_parallel_is_initialized():
        model_parallel_cuda_manual_seed(seed + 100 * stage)
