"""Times single collectives: how fast ranks can talk to each other, apart from any model."""

import time
from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

BANDWIDTH_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Size of what is timed, by the kind of device."""
_REPEATS = 3


def _all_reduce(data: Tensor, group: ProcessGroup) -> Callable[[], object]:
    return lambda: torch.distributed.all_reduce(data, group=group)


def _all_gather(data: Tensor, group: ProcessGroup) -> Callable[[], object]:
    own = data.chunk(group.size())[0].clone()
    return lambda: torch.distributed.all_gather_into_tensor(data, own, group=group)


def _reduce_scatter(data: Tensor, group: ProcessGroup) -> Callable[[], object]:
    own = data.chunk(group.size())[0].clone()
    return lambda: torch.distributed.reduce_scatter_tensor(own, data, group=group)


def _all_to_all(data: Tensor, group: ProcessGroup) -> Callable[[], object]:
    received = torch.empty_like(data)
    return lambda: torch.distributed.all_to_all_single(received, data, group=group)


def _send_to_next(data: Tensor, group: ProcessGroup) -> Callable[[], object]:
    """In a ring, as pipeline stages do in both directions at once."""
    received, rank, size = torch.empty_like(data), group.rank(), group.size()
    after, before = (torch.distributed.get_global_rank(group, (rank + step) % size) for step in (1, -1))

    def exchange() -> None:
        operations = [
            torch.distributed.P2POp(torch.distributed.isend, data, after, group),
            torch.distributed.P2POp(torch.distributed.irecv, received, before, group),
        ]
        for work in torch.distributed.batch_isend_irecv(operations):
            work.wait()

    return exchange


COLLECTIVES: dict[str, Callable[[Tensor, ProcessGroup], Callable[[], object]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send_to_next": _send_to_next,
}
"""Name -> what makes a call of it, over a whole tensor: the sum, what is gathered, what is scattered, what is sent."""


def time_collective(name: str, group: ProcessGroup, device: torch.device, num_bytes: int) -> float:
    """Time a collective. All ranks of the group call it together.

    Args:
        name: a row of :data:`COLLECTIVES`.
        group: the ranks that talk; at least two.
        device: of this rank.
        num_bytes: of the whole tensor, float32; rounded down so that each rank has the same share.

    Returns:
        Seconds of one call, on the slowest rank of the group.
    """
    count = num_bytes // 4 // group.size() * group.size()
    call = COLLECTIVES[name](torch.zeros(count, device=device), group)
    call()  # opens the connections
    _wait(device)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    _wait(device)
    seconds = torch.tensor((time.perf_counter() - start) / _REPEATS, device=device)
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX, group=group)
    return float(seconds)


def sent_share(name: str, group_size: int) -> float:
    """What each rank has to send at least, as a share of the whole tensor.

    Rates multiplied by it compare with the speed of the wire, whatever the collective and the number of ranks (the "bus
    bandwidth" of nccl-tests).
    """
    share = (group_size - 1) / group_size
    return {"all_reduce": 2 * share, "send_to_next": 1.0}.get(name, share)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
