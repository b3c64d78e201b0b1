"""What the findings of all ranks mean together: which nodes fail, and why. Plain data in, plain data out."""

import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megavlm.preflight.collective import Measured
from megavlm.preflight.fact import Facts

MOST_CLOCK_SECONDS = 5.0
"""Clocks that differ by more are an error: times of files and logs of different nodes could not be compared."""


@dataclass(frozen=True)
class Failure:
    """Something that must be mended before the run can start."""

    node: str
    ranks: tuple[int, ...]
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.node} ({name_ranks(self.ranks)}): {self.check}: {self.text}"


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-3, 6``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans}"


def expected_node(rank: int, world_size: int) -> str:
    """Node that a rank should be on: one of the launcher's ``MEGAVLM_NODES``, which hold as many ranks each."""
    nodes = os.environ.get("MEGAVLM_NODES", "").split()
    if not nodes or world_size % len(nodes):
        return "unknown node"
    return nodes[rank * len(nodes) // world_size]


def judge_answers(
    facts: Mapping[int, Facts], world_size: int, doing: Mapping[int, str], timeout_seconds: float
) -> list[Failure]:
    """Failures of the first part: ranks that are missing or hang, checks that failed, nodes that differ.

    Args:
        facts: of the ranks that gave them.
        world_size: ranks that there should be.
        doing: for ranks that answered, the check that they began last; a rank without facts hangs in it.
        timeout_seconds: that they had.
    """
    failures = []
    for rank in sorted(set(range(world_size)) - set(facts)):
        node = expected_node(rank, world_size)
        check = doing.get(rank)
        if check is None:
            failures.append(Failure(node, (rank,), "start", f"gave no sign of life within {timeout_seconds:g} s."))
        else:
            failures.append(Failure(node, (rank,), check or "end", f"hangs; was given {timeout_seconds:g} s."))
    for rank, found in sorted(facts.items()):
        failures += [Failure(found.node, (rank,), check, text) for check, text in found.problems]
    failures += _differences(facts, "versions", lambda found: found.versions, "Install the same on every node.")
    failures += _differences(
        facts, "device", lambda found: {"device": found.device}, "Take nodes of one kind (sbatch --constraint)."
    )
    failures += _differences(
        facts,
        "data",
        lambda found: {key: f"{size} bytes" for key, size in found.files.items()},
        "The nodes do not see the same file.",
    )
    return _merge(failures)


def judge_measured(
    measured: Mapping[int, Measured], facts: Mapping[int, Facts], timeout_seconds: float
) -> list[Failure]:
    """Failures of the second part: collectives that hang, fail or give wrong numbers, clocks that differ."""
    failures = [
        Failure(facts[rank].node, (rank,), "collectives", f"did not come back within {timeout_seconds:g} s.")
        for rank in sorted(set(facts) - set(measured))
    ]
    for rank, seen in sorted(measured.items()):
        node = facts[rank].node
        if seen.error:
            failures.append(Failure(node, (rank,), "collectives", seen.error))
        if seen.wrong_sum:
            failures.append(Failure(node, (rank,), "all-reduce", f"{seen.wrong_sum}."))
    victims = {
        sender: [rank for rank, seen in measured.items() if sender in seen.wrong_ranks]
        for sender in sorted({sender for seen in measured.values() for sender in seen.wrong_ranks})
    }
    for sender, ranks in victims.items():
        text = f"what it sent arrived changed on {name_ranks(ranks)}. Suspect its memory or network card."
        failures.append(Failure(facts[sender].node, (sender,), "all-gather", text))
    for rank, offset in clock_offsets(measured).items():
        if abs(offset) > MOST_CLOCK_SECONDS:
            text = (
                f"is {offset:+.1f} s from the median of all ranks, at most {MOST_CLOCK_SECONDS:g} s. Start NTP there."
            )
            failures.append(Failure(facts[rank].node, (rank,), "clock", text))
    return _merge(failures)


def clock_offsets(measured: Mapping[int, Measured]) -> dict[int, float]:
    """Seconds by which each rank's clock is before (+) or behind (-) the median of all."""
    clocks = {rank: seen.clock_seconds for rank, seen in measured.items() if not seen.error}
    middle = statistics.median(clocks.values()) if clocks else 0.0
    return {rank: clock - middle for rank, clock in clocks.items()}


def _differences(
    facts: Mapping[int, Facts], check: str, read: Callable[[Facts], dict[str, str]], advice: str
) -> list[Failure]:
    """Ranks whose value differs from the most frequent one; of two equally frequent ones rank 0's is right."""
    failures = []
    tables = {rank: read(found) for rank, found in sorted(facts.items())}
    for key in sorted({key for table in tables.values() for key in table}):
        values = {rank: table[key] for rank, table in tables.items() if key in table}
        right, num_right = Counter(values.values()).most_common(1)[0]  # of equal counts the first, the lowest rank's
        for rank, value in values.items():
            if value != right:
                name = "" if key == check else f"{key} "
                text = f"{name}is {value} here and {right} on {num_right} of {len(values)} ranks. {advice}"
                failures.append(Failure(facts[rank].node, (rank,), check, text))
    return failures


def _merge(failures: Sequence[Failure]) -> list[Failure]:
    """Say what ranks of one node have in common once."""
    merged: dict[tuple[str, str, str], list[int]] = {}
    for failure in failures:
        merged.setdefault((failure.node, failure.check, failure.text), []).extend(failure.ranks)
    return [Failure(node, tuple(ranks), check, text) for (node, check, text), ranks in merged.items()]
