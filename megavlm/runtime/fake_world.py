"""One rank of a world that does not exist: build what rank r of a large layout would build, without memory or peers.

Uses torch's ``fake`` process group (collectives return at once and move nothing) and the ``meta`` device. Good for
counting; nothing computed there means anything.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from torch.testing._internal.distributed import fake_pg

from megavlm.runtime.cpu_device import view_device


@contextlib.contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Be ``rank`` of ``world_size`` while the block runs; megatron-core builds on ``meta`` in it.

    The caller makes megatron-core's groups (``parallel_state.initialize_model_parallel``); they are destroyed at the
    end. Every tensor made in the block without a device of its own is on ``meta``, so model, DistributedDataParallel
    and DistributedOptimizer can be built; ``use_cpu_initialization`` may be either.

    Raises:
        ValueError: ``rank`` is not in the world.
        RuntimeError: a real process group exists, or megatron-core sees CUDA.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must lie between 0 and world_size - 1 = {world_size - 1}. Choose one of them.")
    if torch.distributed.is_initialized():
        raise RuntimeError(
            f"world_size={world_size}: this process is already rank {torch.distributed.get_rank()} of"
            f" {torch.distributed.get_world_size()}. Plan in a process of its own."
        )
    with view_device("meta") as device, device:
        torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
        try:
            with _fake_gloo_groups():
                yield
        finally:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _fake_gloo_groups() -> Iterator[None]:
    """Make the extra gloo groups that megatron-core asks for by name fake too: no peer would ever connect."""
    create_group = parallel_state.create_group

    def create_fake_group(ranks: list[int] | None = None, **kwargs: Any) -> torch.distributed.ProcessGroup | None:
        return create_group(ranks, **{**kwargs, "backend": None})

    parallel_state.create_group = create_fake_group
    try:
        yield
    finally:
        parallel_state.create_group = create_group
