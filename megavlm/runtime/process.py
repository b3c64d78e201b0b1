"""Start and end of one process of a run: its device, its default process group, and a clean end.

With torchrun, or a launcher that sets the same variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``), these say who it is. Without them it is the only process, and it needs no port that anybody else
knows. megatron-core's own groups are made by the engine, after this; :func:`stop` ends both.
"""

import atexit
import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core import parallel_state

from megavlm.runtime.cpu_device import current_device
from megavlm.runtime.log import warn_once

DEFAULT_TIMEOUT_MINUTES = 10.0
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_to_close: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Process:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    """``nccl`` on CUDA, ``gloo`` on CPU."""


def start(*, timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES, num_threads: int | None = None) -> Process:
    """Choose the device and join the default process group.

    Args:
        timeout_minutes: how long a collective waits for the other ranks before it fails.
        num_threads: of torch's CPU kernels; default what ``OMP_NUM_THREADS`` or torch itself says.

    Raises:
        ValueError: a value is out of range, the launcher's variables are incomplete or contradict each other, or
            this node has fewer GPUs than processes.
        RuntimeError: the process group exists already.
    """
    if timeout_minutes <= 0:
        raise ValueError(f"timeout_minutes={timeout_minutes}: must be above 0. Default: {DEFAULT_TIMEOUT_MINUTES}.")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads}: must be at least 1. Leave it out to let torch choose.")
    if torch.distributed.is_initialized():
        raise RuntimeError("start() was called twice: the default process group exists. Call stop() first.")
    rank, world_size, local_rank = read_launcher()
    device = _take_device(local_rank)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":  # megatron-core overlaps communication rightly only if kernels start in order
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        store = torch.distributed.HashStore()  # one process meets itself: no port, no file
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    atexit.register(stop, clean=False)
    return Process(rank, world_size, local_rank, device, backend)


def before_stop(close: Callable[[], None]) -> None:
    """Have something closed while the process groups that it uses still exist, however the process ends.

    Args:
        close: called once, by :func:`stop`, on each rank by itself: without collectives.
    """
    _to_close.append(close)


def stop(*, clean: bool = True) -> None:
    """Leave megatron-core's groups and the default process group. Does nothing if there are none.

    A gloo process that exits without this aborts now and then ("terminate called without an active exception"), and
    its launcher calls a good run a failure: gloo's thread waits for python's lock to free a finished collective's
    tensors, and the interpreter that ends meanwhile kills the thread.

    Args:
        clean: all ranks come here: wait for them first, so that none closes connections that another still reads.
            False after an error: the others may never come.
    """
    atexit.unregister(stop)
    if not torch.distributed.is_initialized():
        return
    if not clean and torch.distributed.get_backend() == "nccl":
        return  # destroying nccl groups with work in flight can hang; the exit of a failed process frees them
    try:
        while _to_close:
            _to_close.pop()()
        if clean:
            torch.distributed.barrier()
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def process(*, timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES, num_threads: int | None = None) -> Iterator[Process]:
    """:func:`start` and, however the block ends, :func:`stop`."""
    me = start(timeout_minutes=timeout_minutes, num_threads=num_threads)
    try:
        yield me
    except BaseException:
        stop(clean=False)
        raise
    stop()


def read_launcher() -> tuple[int, int, int]:
    """Return rank, world size and local rank from the launcher's variables.

    Raises:
        ValueError: they are incomplete or contradict each other.
    """
    given = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if "RANK" not in given:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: RANK is not set, so this process does not know which of them"
                " it is. Start it with torchrun."
            )
        return 0, 1, 0
    missing = [name for name in _LAUNCHER_VARIABLES if name not in given]
    if missing:
        raise ValueError(
            f"RANK={os.environ['RANK']}: {', '.join(missing)} is missing of {', '.join(_LAUNCHER_VARIABLES)}."
            " Set all of them (torchrun does), or none for a single process."
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank}: must lie between 0 and WORLD_SIZE - 1 = {world_size - 1}. Check the launcher.")
    return rank, world_size, int(os.environ.get("LOCAL_RANK", "0"))


def _take_device(local_rank: int) -> torch.device:
    """This process's device; with CUDA also made torch's current one."""
    device = current_device()
    if device.type == "cpu" and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        warn_once(f"torch was built for CUDA {torch.version.cuda} but finds no GPU: running on the CPU")
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if local_rank >= num_devices:
            raise ValueError(
                f"LOCAL_RANK={local_rank}: this node has {num_devices} CUDA device(s). Start at most {num_devices}"
                " processes on it."
            )
        torch.cuda.set_device(local_rank)
    return device
