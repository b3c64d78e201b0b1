"""Signs of life: what ranks tell each other of themselves, and the sentences that say who holds up a run."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megavlm.runtime.activity import PHASES, Moment, Phase


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself."""

    beat: int
    """Counts up with every sign: one that stays the same comes from a rank that is gone or stopped."""
    node: str
    step: int
    phase: Phase
    part: int
    idle_seconds: float
    """For how long it had not got anywhere when it said so."""

    @classmethod
    def of(cls, moment: Moment, *, beat: int, node: str, idle_seconds: float) -> "Sign":
        """The sign of a process that is at this moment."""
        return cls(beat, node, moment.step, moment.phase, moment.part, idle_seconds)

    @property
    def place(self) -> tuple[int, int, int]:
        """Who is behind has the smaller one."""
        return self.step, PHASES.index(self.phase), self.part

    def to_text(self) -> str:
        """For the store."""
        return json.dumps(dataclasses.asdict(self) | {"phase": self.phase.name})

    @classmethod
    def from_text(cls, text: str | bytes) -> "Sign":
        """Back from the store."""
        fields = json.loads(text)
        return cls(**fields | {"phase": Phase[fields["phase"]]})

    def position(self) -> str:
        """``step 18, forward and backward, micro-batch 2``."""
        part = {Phase.COMPUTING: "micro-batch", Phase.VALIDATING: "batch"}.get(self.phase)
        where = f", {part} {self.part}" if part and self.part else ""
        return f"step {self.step}, {self.phase.value}{where}"


@dataclass(frozen=True)
class Lookout:
    """What one rank knows of all, itself included."""

    signs: Mapping[int, Sign]
    """By rank; ranks that never gave a sign are absent."""
    silent_seconds: Mapping[int, float]
    """For how long the beat of each of those has stood still."""
    world_size: int

    def lost(self, after_seconds: float) -> list[int]:
        """Ranks that gave no sign for so long."""
        return sorted(rank for rank, silent in self.silent_seconds.items() if silent >= after_seconds)

    def behind(self) -> list[int]:
        """Ranks that are not as far as the furthest; none if all are at the same place. Those behind most only."""
        places = {rank: sign.place for rank, sign in self.signs.items()}
        least = min(places.values(), default=None)
        if least is None or least == max(places.values()):
            return []
        return sorted(rank for rank, place in places.items() if place == least)

    def say_lost(self, ranks: Iterable[int]) -> str:
        """Sentences on ranks that are gone."""
        return " ".join(
            f"Rank {rank} ({self.signs[rank].node}) has given no sign of life for {self.silent_seconds[rank]:.0f} s: it"
            f" was killed or stopped, or its node is gone. Last seen at {self.signs[rank].position()}."
            for rank in ranks
        )

    def say_hung(self, seconds: float) -> str:
        """Sentences on ranks that live and get nowhere."""
        behind = self.behind()
        if not behind:
            return f"No rank has got anywhere for {seconds:.0f} s, and all are at the same place."
        sentences = " ".join(
            f"Rank {rank} ({self.signs[rank].node}) hangs at {self.signs[rank].position()}." for rank in behind
        )
        return f"No rank has got anywhere for {seconds:.0f} s. {sentences} The others wait for it."

    def say_others(self, besides: Iterable[int]) -> str:
        """What all ranks but some are doing: ``Ranks 0-2, 5: step 18, comparing the step ... for 12 s.``"""
        left_out = set(besides)
        groups: dict[str, list[int]] = {}
        for rank, sign in sorted(self.signs.items()):
            if rank not in left_out:
                groups.setdefault(sign.position(), []).append(rank)
        lines = []
        for position, ranks in groups.items():
            seconds = min(self.signs[rank].idle_seconds for rank in ranks)
            lines.append(f"{name_ranks(ranks).capitalize()}: {position}, for {seconds:.0f} s or more.")
        unheard = [rank for rank in range(self.world_size) if rank not in self.signs]
        return " ".join([*lines, *([f"Never heard of: {name_ranks(unheard)}."] if unheard else [])])


def name_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    spans = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ordered) > 1 else ''} {spans}"
