"""Prompts shared over the data-parallel ranks, those of like length answered together, results on every rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megavlm.build import Parts
from megavlm.checkpoint.agreement import agreed
from megavlm.data import Sample

Result = TypeVar("Result")

# Prompts of so many batches are read together, and sorted by length, so that rows of a batch need little padding.
_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What stands for a prompt that cannot be asked."""

    result: Result


def answer_shared(
    parts: Parts,
    numbers: Sequence[int],
    read: Callable[[int], Sample | Done[Result]],
    answer: Callable[[Sequence[tuple[int, Sample]]], Sequence[Result]],
    *,
    batch_size: int,
) -> Iterator[list[tuple[int, Result]]]:
    """Answer prompts. Collective: all ranks call it with the same numbers, and take everything it yields.

    Args:
        parts: with a wrapped model.
        numbers: names of the prompts.
        read: gives the prompt of a number, or its result where there is nothing to ask.
        answer: gives a result for each prompt of a batch, in order; all ranks of a model replica call it together.
        batch_size: most prompts of a batch, on each data-parallel rank.

    Yields:
        Numbers and results of all ranks as they come, the same on every rank, in the order of the numbers within a
        yield.

    Raises:
        ValueError: ``read`` raised it on some rank; on every rank.
    """
    size, rank = parts.engine.data_parallel_size, parts.engine.data_parallel_rank
    at_once = batch_size * size * _BATCHES_AT_ONCE
    for start in range(0, len(numbers), at_once):
        together = numbers[start : start + at_once]
        prompts: list[tuple[int, Sample]] = []
        ready: list[tuple[int, Result]] = []
        with agreed("reading prompts"):
            for number in together[rank::size]:
                found = read(number)
                if isinstance(found, Done):
                    ready.append((number, found.result))
                else:
                    prompts.append((number, found))
        yield _merged(parts, ready)
        # longest first: what does not fit into memory fails at once
        prompts.sort(key=lambda prompt: prompt[1].num_tokens, reverse=True)
        largest_share = -(-len(together) // size)  # every rank counts to it: gathering is a collective
        for first in range(0, largest_share, batch_size):
            batch = prompts[first : first + batch_size]
            results = answer(batch) if batch else []
            yield _merged(parts, [(number, result) for (number, _), result in zip(batch, results, strict=True)])


def _merged(parts: Parts, mine: list[tuple[int, Result]]) -> list[tuple[int, Result]]:
    """The results of all data-parallel ranks."""
    gathered = parts.engine.gather_over_replicas(mine)
    return sorted((entry for share in gathered for entry in share), key=lambda entry: entry[0])
