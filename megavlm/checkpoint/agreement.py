"""Makes ranks agree: what one rank knows all know, and where one fails all fail.

Saving and loading are a chain of collectives. A rank that raises by itself leaves the others waiting in the next one,
so whatever can fail on one rank alone runs in a block of :func:`agreed`. Everything here also works in a process
without a process group, as its only rank.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed
from torch.distributed.checkpoint import CheckpointException

from megavlm.engines.guards import CHECKPOINT_ERRORS

T = TypeVar("T")

# megatron-core asserts what it finds in a state dict; torch.load says with a PickleError what is no data
_ERRORS: tuple[type[BaseException], ...] = (*CHECKPOINT_ERRORS, AssertionError, pickle.PickleError)


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Return every rank's value, by rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def agreed(doing: str) -> Iterator[None]:
    """Leave the block together. Collective, so a block holds no collective that another rank may not reach.

    Args:
        doing: what the block does, for errors that do not say it themselves (``writing /runs/a/iter_0000100``).

    Raises:
        ValueError: the block failed on at least one rank; the same text on every rank, that of the lowest such rank.
    """
    problem, cause = None, None
    try:
        yield
    except _ERRORS as error:
        problem, cause = _describe(error, doing), error
    problems = gather(problem)
    first = next((text for text in problems if text is not None), None)
    if first is not None:
        raise ValueError(first) from cause


def from_rank_0(doing: str, compute: Callable[[], T]) -> T:
    """Compute a value on rank 0 and hand it to all. Collective.

    Raises:
        ValueError: ``compute`` failed; on every rank.
    """
    value: list[Any] = [None]
    with agreed(doing):
        if rank() == 0:
            value = [compute()]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(value, src=0)
    return value[0]


def _describe(error: BaseException, doing: str) -> str:
    """One sentence for an error: our own as they are, others with what was going on."""
    if type(error) is ValueError:
        return str(error)
    failed = rank()
    if isinstance(error, CheckpointException) and error.failures:  # its own text is every rank's traceback
        failed, (error, _) = min(error.failures.items())
    first_line = (str(error).splitlines() or [""])[0]
    return f"{doing}: failed on rank {failed} with {type(error).__name__} ({first_line})."
