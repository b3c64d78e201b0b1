"""Shares the work of a filter over ranks. What is computed does not depend on their number."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megavlm.build import Parts
from megavlm.checkpoint.agreement import agreed, gather, rank, world_size

Work = TypeVar("Work")
Result = dict[str, Any]


@dataclass(frozen=True)
class Team:
    """Who shares the work."""

    rank: int
    size: int
    gather: Callable[[list[Result]], list[list[Result]]]
    """The results of all, by rank. Collective."""


def all_ranks() -> Team:
    """Every rank of the process group by itself; one without a process group."""
    return Team(rank(), world_size(), gather)


def team_of(parts: Parts) -> Team:
    """The replicas of a model; the ranks of one work together."""
    engine = parts.engine
    return Team(engine.data_parallel_rank, engine.data_parallel_size, engine.gather_over_replicas)


def in_batches(numbers: Sequence[int], batch_size: int, done: set[int]) -> list[list[int]]:
    """Cut numbers into batches, and leave out those of which everything is done.

    The cuts do not depend on what is done, nor on ranks: a batch always holds the same samples, which matters where
    results differ by rounding with what stands beside them.
    """
    batches = [list(numbers[first : first + batch_size]) for first in range(0, len(numbers), batch_size)]
    return [batch for batch in batches if not done.issuperset(batch)]


def shared(
    batches: Sequence[list[int]],
    read: Callable[[list[int]], Work],
    compute: Callable[[Work], list[Result]],
    team: Team,
) -> Iterator[list[Result]]:
    """Work on batches, one for each rank at a time. Collective: all ranks take everything it yields.

    Args:
        batches: the same on every rank.
        read: what can fail on one rank alone; makes the work of a batch.
        compute: its results; ranks of a model replica call it together.
        team: who shares.

    Yields:
        Results of all ranks in the order of the batches, the same on every rank.

    Raises:
        ValueError: ``read`` raised it on some rank; on every rank.
    """
    for first in range(0, len(batches), team.size):
        work: list[Work] = []
        with agreed("reading samples"):
            if first + team.rank < len(batches):
                work.append(read(batches[first + team.rank]))
        results = compute(work[0]) if work else []
        yield [result for part in team.gather(results) for result in part]
