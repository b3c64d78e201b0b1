"""Memory of this process."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS_FILE = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    peak: int
    now: int


def read_memory(device: torch.device) -> Memory:
    """Bytes of this process: allocated by torch on CUDA, else resident."""
    if device.type == "cuda":
        return Memory(torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device))
    if _STATUS_FILE.exists():
        # not getrusage: on Linux its peak begins with that of the process that started this one
        fields = dict(line.split(":", 1) for line in _STATUS_FILE.read_text(encoding="ascii").splitlines())
        peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
        return Memory(peak, now)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(peak, peak)  # so far
