"""What ranks tell each other beside the work of a step."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

T = TypeVar("T")


class RankTalk:
    """Sums, lists and votes over ranks; an engine has them."""

    device: torch.device
    """Where the tensors of this rank live."""

    def sum_over_replicas(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers over the data-parallel ranks."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.tolist()

    def sum_over_ranks(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers over all ranks."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def gather_over_replicas(self, item: T) -> list[T]:
        """Return the items of all data-parallel ranks, in their order."""
        group = parallel_state.get_data_parallel_group()
        items: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(items, item, group=group)
        return items

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank of the run says yes: the same answer everywhere."""
        votes = torch.tensor([int(flag)], device=self.device)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        return bool(votes.item())
