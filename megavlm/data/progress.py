"""Which samples of the endless sequence a run has used: what a checkpoint keeps to go on exactly there.

The sequence is dealt to lanes: position ``p`` belongs to lane ``p % num_lanes``. A loader without packing has one lane.
A loader that packs has one for each micro-batch of a step, and there a lane may take samples out of turn. Whatever the
number of lanes, the samples not yet used are known one by one, so that a run goes on with another number of ranks or
micro-batches, or with packing switched on or off, without a sample lost or used twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaneProgress:
    """How far a lane is."""

    next_position: int
    """The first position that was not looked at; the lane's later ones follow."""
    pending: tuple[int, ...] = ()
    """Positions before it, in their order, that were passed over and are still to be used."""

    @property
    def num_used(self) -> int:
        """Samples used, of a lane that has all positions to itself."""
        return self.next_position - len(self.pending)

    def position_of(self, number: int) -> int:
        """The position of the sample that is used as ``number``-th (from 0), of a lane that has all positions."""
        return number if number >= self.next_position else self.pending[number - self.num_used]

    def after(self, num_used: int) -> "LaneProgress":
        """The lane, which has all positions, after that many samples are used in their order."""
        return LaneProgress(max(self.next_position, num_used), self.pending[num_used - self.num_used :])

    def positions(self, num_lanes: int) -> Iterator[int]:
        """All positions still to be used, without end."""
        yield from self.pending
        position = self.next_position
        while True:
            yield position
            position += num_lanes


@dataclass(frozen=True)
class Progress:
    """How far a run is: one entry for each lane."""

    lanes: tuple[LaneProgress, ...]

    @classmethod
    def after(cls, num_samples: int) -> "Progress":
        """The first samples used in their order, and no other."""
        return cls((LaneProgress(num_samples),))

    @classmethod
    def gathered(cls, parts: Sequence[Mapping[int, LaneProgress]]) -> "Progress":
        """Put together what the ranks know of their lanes."""
        lanes = {number: lane for part in parts for number, lane in part.items()}
        assert sorted(lanes) == list(range(len(lanes))), sorted(lanes)
        return cls(tuple(lanes[number] for number in range(len(lanes))))

    def dealt_to(self, num_lanes: int) -> "Progress":
        """The same with another number of lanes."""
        if num_lanes == len(self.lanes):
            return self
        frontier = max(lane.next_position for lane in self.lanes)
        pending = sorted(
            position
            for lane in self.lanes
            for position in (*lane.pending, *range(lane.next_position, frontier, len(self.lanes)))
        )
        return Progress(
            tuple(
                LaneProgress(
                    frontier + (number - frontier) % num_lanes,
                    tuple(position for position in pending if position % num_lanes == number),
                )
                for number in range(num_lanes)
            )
        )

    def to_json(self) -> list[Any]:
        """As plain lists."""
        return [[lane.next_position, list(lane.pending)] for lane in self.lanes]

    @classmethod
    def from_json(cls, entries: Sequence[Any]) -> "Progress":
        """Read what :meth:`to_json` gave."""
        return cls(tuple(LaneProgress(next_position, tuple(pending)) for next_position, pending in entries))
