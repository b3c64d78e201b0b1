"""The harness itself: results, and what is said of a rank that fails."""

import os
import time

import pytest
import torch
import torch.distributed
from harness import RankError, run_ranks
from megatron.core import parallel_state


def _sum_of_ranks(start: int) -> tuple[torch.Tensor, int]:
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    total = torch.tensor(start + torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    return total, torch.get_num_threads()


def _fail(rank: int, how: str) -> None:
    print("about to", how)
    if torch.distributed.get_rank() == rank:
        if how == "die":
            os._exit(3)
        if how == "hang":
            time.sleep(60)
        raise ValueError(f"rank={rank}: is wrong")
    torch.distributed.barrier()


def test_ranks_are_used_again_with_groups_of_their_own() -> None:
    for world_size, total in ((2, 21), (1, 10), (2, 21)):
        assert run_ranks(_sum_of_ranks, world_size, 10) == [(torch.tensor(total), 1)] * world_size


FAILURES = [
    ("raise", 60, r"(?s)rank 1 of 2 failed in _fail:.*ValueError: rank=1: is wrong.*about to raise"),
    ("die", 60, r"(?s)rank 1 of 2 failed in _fail:\ndied with exit code 3.*about to die"),
    ("hang", 10, r"(?s)rank 0 of 2 failed in _fail:.*Timed out waiting.*about to hang"),
]


@pytest.mark.parametrize(("how", "timeout", "message"), FAILURES, ids=[how for how, _, _ in FAILURES])
def test_the_rank_that_failed_first_is_named(how: str, timeout: float, message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(_fail, 2, 1, how, timeout=timeout)
    assert len(run_ranks(_sum_of_ranks, 2, 0)) == 2
