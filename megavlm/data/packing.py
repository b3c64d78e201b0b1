"""Chooses which samples share a row."""

from collections.abc import Iterator
from dataclasses import dataclass

import pydantic

from megavlm.config import Config


class PackingConfig(Config):
    """Several samples in each row of ``seq_length`` tokens. No token attends to another sample of its row."""

    buffer_size: int = pydantic.Field(default=64, ge=1)
    """How many samples ahead a row may choose from. More fill rows better and change the order of samples more."""
    max_tiles_per_row: int | None = pydantic.Field(default=None, ge=1)
    """Most tiles of a row; a single sample with more has a row to itself. None: as many as come."""


@dataclass(frozen=True)
class Candidate:
    """A sample that waits for a row."""

    position: int
    """In the endless sequence of samples."""
    num_tokens: int
    """0 of a sample that cannot be used: it goes along, to be reported."""
    num_tiles: int


class RowPacker:
    """Fills one row after the other: the oldest sample first, then the longest that still fits, until none does.

    Of equally long ones the oldest is taken. What a row holds follows from the samples still to be used and nothing
    else, so a run goes on exactly from their list.
    """

    def __init__(self, candidates: Iterator[Candidate], config: PackingConfig, capacity: int) -> None:
        """Take an endless supply.

        Args:
            candidates: the lane's samples, in their order.
            config: how far to look ahead.
            capacity: most tokens of a row; no candidate has more.
        """
        self._candidates = candidates
        self._config = config
        self._capacity = capacity
        self.buffer: list[Candidate] = []
        """Candidates that were looked at and not used, in their order."""

    def next_row(self) -> list[Candidate]:
        """Return the samples of the next row."""
        self._refill()
        row = [self.buffer.pop(0)]
        room = self._capacity - row[0].num_tokens
        num_unusable = 0
        while num_unusable < self._config.buffer_size:  # a data set may have nothing else
            self._refill()
            num_tiles = sum(candidate.num_tiles for candidate in row)
            fitting = [
                candidate
                for candidate in self.buffer
                if candidate.num_tokens <= room and self._has_room_for_tiles(num_tiles + candidate.num_tiles)
            ]
            if not fitting:
                break
            best = max(fitting, key=lambda candidate: (candidate.num_tokens, -candidate.position))
            self.buffer.remove(best)
            row.append(best)
            room -= best.num_tokens
            num_unusable += best.num_tokens == 0
        return row

    def _refill(self) -> None:
        while len(self.buffer) < self._config.buffer_size:
            self.buffer.append(next(self._candidates))

    def _has_room_for_tiles(self, num_tiles: int) -> bool:
        return self._config.max_tiles_per_row is None or num_tiles <= self._config.max_tiles_per_row
