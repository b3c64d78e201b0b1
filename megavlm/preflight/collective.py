"""What the ranks can only find out together: right sums, bandwidth, clocks."""

import dataclasses
import json
import time
from dataclasses import dataclass, field

import torch
import torch.distributed

from megavlm.preflight.bandwidth import BANDWIDTH_BYTES, sent_share, time_collective
from megavlm.runtime.process import Process, process


@dataclass
class Measured:
    """What one rank saw of the others. Travels as JSON."""

    wrong_ranks: list[int] = field(default_factory=list)
    """Ranks whose numbers arrived changed."""
    wrong_sum: str = ""
    """What an all-reduce gave in place of the right sum; empty if it was right."""
    clock_seconds: float = 0.0
    """This rank's clock, just after all ranks met."""
    num_bytes: int = 0
    all_reduce_seconds: float = 0.0
    """Of one all-reduce of ``num_bytes``, on the slowest rank."""
    error: str = ""
    """Why it ended early."""

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Measured":
        """Read what another rank measured."""
        return cls(**json.loads(text))

    def bandwidth(self, world_size: int) -> tuple[float, float]:
        """Bytes per second of the all-reduce, and those that each rank had to send for it (``2 (n - 1) / n``)."""
        plain = self.num_bytes / self.all_reduce_seconds
        return plain, plain * sent_share("all_reduce", world_size)


def measure(timeout_seconds: float) -> Measured:
    """Join the default process group, try it, and leave it. All ranks call this together."""
    try:
        with process(timeout_minutes=timeout_seconds / 60.0) as me:
            return _measure(me)
    except (RuntimeError, ValueError) as error:  # a collective that fails or ends its time is a RuntimeError
        return Measured(error=str(error).splitlines()[0])


def _measure(me: Process) -> Measured:
    result = Measured(num_bytes=BANDWIDTH_BYTES[me.device.type])
    result.wrong_ranks = _gather_patterns(me)
    result.wrong_sum = _sum_patterns(me)
    everyone = torch.distributed.group.WORLD
    assert everyone is not None, "the default process group exists"
    result.all_reduce_seconds = time_collective("all_reduce", everyone, me.device, result.num_bytes)
    torch.distributed.barrier()
    result.clock_seconds = time.time()
    return result


def _pattern(rank: int, device: torch.device) -> torch.Tensor:
    """Numbers that only this rank sends; sums of them over 5,000 ranks are exact in float32."""
    return (torch.arange(4096, device=device, dtype=torch.float32) % 2) * (rank + 1)


def _gather_patterns(me: Process) -> list[int]:
    """Ranks whose pattern did not arrive here as it was sent."""
    received = [torch.empty(4096, device=me.device) for _ in range(me.world_size)]
    torch.distributed.all_gather(received, _pattern(me.rank, me.device))
    return [rank for rank, data in enumerate(received) if not torch.equal(data, _pattern(rank, me.device))]


def _sum_patterns(me: Process) -> str:
    """What is wrong with the sum of all patterns; empty if nothing is."""
    data = _pattern(me.rank, me.device)
    torch.distributed.all_reduce(data)
    right = _pattern(0, me.device) * (me.world_size * (me.world_size + 1) // 2)
    if torch.equal(data, right):
        return ""
    at = int((data != right).nonzero()[0])
    return f"element {at} of the sum is {data[at].item()}, not {right[at].item()}"
