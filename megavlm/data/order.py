"""The order in which samples are used: a pure function of the seed, the epoch and the number of rows.

Nothing of the layout enters it, so a run resumed with another number of ranks or workers sees the same samples. The
shuffle is written out here because the random generators of numpy and torch may change from release to release.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy

_Integers = numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]


def row_at(position: int, num_rows: int, seed: int, shuffle: bool) -> int:
    """Return which row of the dataset stands at a position of the endless sequence of samples.

    Args:
        position: counts from 0 over all epochs.
        num_rows: rows of the dataset; each epoch uses every row once.
        seed: of the shuffle.
        shuffle: whether each epoch has an order of its own, or all have the file's.
    """
    epoch, offset = divmod(position, num_rows)
    return int(shuffled_rows(num_rows, seed, epoch)[offset]) if shuffle else offset


@functools.lru_cache(maxsize=4)
def shuffled_rows(num_rows: int, seed: int, epoch: int) -> _Integers:
    """Return the rows of one epoch in their order: ``[num_rows]`` int64. Do not change it; it is cached."""
    return _shuffled_rows(num_rows, seed, epoch)


def _shuffled_rows(num_rows: int, seed: int, epoch: int) -> _Integers:
    key = _scramble(numpy.array([seed], dtype=numpy.int64).view(numpy.uint64))
    key = _scramble(key ^ numpy.uint64(epoch))
    return numpy.argsort(_scramble(key ^ numpy.arange(num_rows, dtype=numpy.uint64)), kind="stable")


def _scramble(
    values: "numpy.ndarray[tuple[int], numpy.dtype[numpy.uint64]]",
) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.uint64]]":
    """A one-to-one mixing of 64-bit numbers: one step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = values + numpy.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> numpy.uint64(31))


class Order(Protocol):
    """Which row stands at each position of the endless sequence of samples."""

    def row(self, position: int) -> int:
        """Return the row at a position, which counts from 0 over all epochs."""


class EpochOrder:
    """All rows, epoch for epoch; see :func:`row_at`."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        """See :func:`row_at`."""
        self.num_rows = num_rows
        self._shuffle = shuffle
        # A cache of its own: many sources would push each other out of a shared one.
        self._shuffled = functools.lru_cache(maxsize=2)(lambda epoch: _shuffled_rows(num_rows, seed, epoch))

    def row(self, position: int) -> int:
        """See :class:`Order`."""
        epoch, offset = divmod(position, self.num_rows)
        return int(self._shuffled(epoch)[offset]) if self._shuffle else offset


class ShareOrder:
    """Sources in given shares, each in its own order.

    The sequence is made of equal blocks in which every source has its exact share, shuffled block for block: the share
    of a source is never off by more than its part of one block. Rows are numbered over all sources, one source behind
    the other.
    """

    def __init__(self, sources: Sequence[EpochOrder], shares: Sequence[Fraction], seed: int) -> None:
        """Plan a block.

        Args:
            sources: the order inside each source.
            shares: of each source; they add up to 1. Met exactly where a block of :data:`LONGEST_BLOCK` can, and
                otherwise to one part in so many; no source is left out.
            seed: of the shuffle.
        """
        self._sources = sources
        self._seed = seed - 1  # not that of the first source
        self._counts = block_counts(shares)
        self._length = sum(self._counts)
        self._starts = _starts(sources)
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def row(self, position: int) -> int:
        """See :class:`Order`."""
        block, offset = divmod(position, self._length)
        source_of_place, number_of_place = self._block(block)
        source = int(source_of_place[offset])
        number = block * self._counts[source] + int(number_of_place[offset])
        return self._starts[source] + self._sources[source].row(number)

    def _make_block(self, block: int) -> tuple[_Integers, _Integers]:
        """The source at each place, and how many places before it in the block have the same source."""
        sources = numpy.repeat(numpy.arange(len(self._counts)), self._counts)
        sources = sources[_shuffled_rows(self._length, self._seed, block)]
        numbers = numpy.empty_like(sources)
        for source, count in enumerate(self._counts):
            numbers[sources == source] = numpy.arange(count)
        return sources, numbers


class EpochsOrder:
    """Passes in which each source has a fixed number of samples, in its own order; a part of a source goes on in the
    next pass where it ended. Rows are numbered over all sources."""

    def __init__(self, sources: Sequence[EpochOrder], counts: Sequence[int], seed: int, shuffle: bool) -> None:
        """Plan a pass.

        Args:
            sources: the order inside each source.
            counts: samples of each source in a pass.
            seed: of the shuffle.
            shuffle: whether the sources are mixed; otherwise one follows the other.
        """
        self._sources = sources
        self._counts = counts
        self._starts = _starts(sources)
        self._ends = numpy.cumsum(counts)
        self._mixed = EpochOrder(int(self._ends[-1]), seed, shuffle)

    def row(self, position: int) -> int:
        """See :class:`Order`."""
        number_of_pass = position // int(self._ends[-1])
        place = self._mixed.row(position)
        source = int(numpy.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[source]) - self._counts[source]
        number = number_of_pass * self._counts[source] + place - before
        return self._starts[source] + self._sources[source].row(number)


LONGEST_BLOCK = 65_536
"""Samples."""


def block_counts(shares: Sequence[Fraction]) -> list[int]:
    """Return how many samples of each source a block has: the shortest block that is exact, or the longest."""
    length = math.lcm(*(share.denominator for share in shares))
    if length <= LONGEST_BLOCK:
        return [int(share * length) for share in shares]
    counts = [max(1, int(share * LONGEST_BLOCK)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: -(shares[source] * LONGEST_BLOCK % 1))
    for source in by_remainder[: max(0, LONGEST_BLOCK - sum(counts))]:
        counts[source] += 1
    return counts


def _starts(sources: Sequence[EpochOrder]) -> list[int]:
    """The number of each source's first row."""
    return list(itertools.accumulate((source.num_rows for source in sources), initial=0))[:-1]
