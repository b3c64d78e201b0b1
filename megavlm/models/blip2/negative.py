"""Negatives: the pairs of all data-parallel ranks, and the hard ones among them. Shape letters as in ``pair.py``."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megavlm.models.initialization import generator_of


def gather_rows(rows: Tensor) -> Tensor:
    """Put the rows of all data-parallel ranks together, in the order of the ranks: ``[N, ...]`` -> ``[W, ...]``.

    The gradient of a row is the sum of what all ranks' losses say of it, as if they were one process. (BLIP-2's own
    code gathers what it contrasts without gradient, so there other ranks' images and captions are constants, and the
    gradient depends on the number of processes.)
    """
    return gather_from_sequence_parallel_region(rows, group=parallel_state.get_data_parallel_group())


def first_row() -> int:
    """Which share of the gathered rows is this rank's: counted in shares."""
    return parallel_state.get_data_parallel_rank()


def longest_of_replicas(length: int, device: torch.device) -> int:
    """The largest of the data-parallel ranks' numbers."""
    group = parallel_state.get_data_parallel_group()
    if group.size() == 1:
        return length
    longest = torch.tensor([length], device=device)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(longest)


def draw_numbers(seed: int, micro_batch: int | None, num_rows: int) -> Tensor:
    """Draw two numbers in [0, 1) for each row of all ranks: ``[2, W]`` float64, on the CPU.

    They depend on the seed, on how many micro-batches were trained on before (None: validation, which always draws the
    same) and on the row's place among all: not on the layout, and not on whether the run was ever interrupted.
    """
    generator = generator_of(seed, f"hard_negatives.{'validation' if micro_batch is None else micro_batch}")
    return torch.rand(2, num_rows, dtype=torch.float64, generator=generator)


def choose(similarities: Tensor, allowed: Tensor, numbers: Tensor) -> Tensor:
    """Choose a candidate for each row with the probabilities of a softmax.

    Args:
        similarities: ``[N, W]``, divided by the temperature.
        allowed: ``[N, W]`` bool; others are never chosen. In a row that allows nobody the choice means nothing.
        numbers: ``[N]`` float64 in [0, 1); a candidate is chosen for the share of them that is its probability.

    Returns:
        ``[N]`` int64, the same on every tensor-parallel rank.
    """
    scores = similarities.detach().to(torch.float64).masked_fill(~allowed, float("-inf"))
    likely = torch.softmax(scores, dim=1).nan_to_num(0.0).cumsum(1)
    total = likely[:, -1:]
    # below the total whatever the rounding, so that the first sum above it belongs to a candidate
    wanted = torch.minimum(numbers.to(total.device).unsqueeze(1) * total, torch.nextafter(total, total * 0.0))
    chosen = torch.searchsorted(likely, wanted, right=True).squeeze(1).clamp(max=similarities.shape[1] - 1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(chosen, src=source, group=group)
    return chosen
