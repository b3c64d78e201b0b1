"""The order in which samples are used: a pure function of the seed, the epoch and the number of rows.

Nothing of the layout enters it, so a run resumed with another number of ranks or workers sees the same samples. The
shuffle is written out here because the random generators of numpy and torch may change from release to release.
"""

import functools

import numpy


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
def shuffled_rows(num_rows: int, seed: int, epoch: int) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]":
    """Return the rows of one epoch in their order: ``[num_rows]`` int64. Do not change it; it is cached."""
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
