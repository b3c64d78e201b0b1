"""What ``tools/fault_campaign.py`` concludes from what a run left behind: curves, lost steps, the table."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CHECKPOINT = re.compile(r"iter_(\d{7,})")
RESUMED = re.compile(r"resuming \S+ after step (\d+)")
_CURVE = ("iteration", "lm loss", "grad norm", "lr", "trained tokens", "skip reason")

Point = tuple[Any, ...]


@dataclass
class Outcome:
    """One round: a line of ``rounds.jsonl``."""

    fault: str
    round: int
    seed: int
    moment: str = ""
    """When the fault came, in words."""
    expected: str = ""
    end: str = ""
    """State of the last job of the chain."""
    num_jobs: int = 0
    """Submissions."""
    num_restarts: int = 0
    """Times that SLURM started a job of the chain again."""
    steps_lost: int = 0
    """Steps that were done when the fault came and had to be done again."""
    detection_seconds: float | None = None
    """From the fault to the first line, or state of the job, that tells it."""
    said: str = ""
    """That line."""
    is_curve_identical: bool = False
    are_weights_identical: bool = False
    problems: list[str] = field(default_factory=list)
    """What was not as expected; the round was survived if there is nothing."""
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def survived(self) -> bool:
        """Whether all was as expected."""
        return not self.problems


def read_curve(metrics: Path) -> list[Point]:
    """Loss, gradient norm, learning rate and tokens of every step, exactly as they are written; torn lines are errors.

    Raises:
        ValueError: a line is not JSON.
    """
    points = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            point = json.loads(line)
        except ValueError:
            raise ValueError(f"{metrics}:{number}: is not a line of metrics: {line[:60]!r}.") from None
        if "lm loss" in point:
            points.append(tuple(point.get(name) for name in _CURVE))
    return points


def compare_curves(curve: Sequence[Point], reference: Sequence[Point]) -> str | None:
    """Say how a curve differs from the reference, or None where they are the same bit for bit."""
    if curve == reference:
        return None
    steps, expected = [point[0] for point in curve], [point[0] for point in reference]
    if steps != expected:
        wrong = next((k for k, pair in enumerate(zip(steps, expected, strict=False)) if pair[0] != pair[1]), None)
        where = f"entry {wrong + 1} is step {steps[wrong]}" if wrong is not None else "one ends before the other"
        return f"the curve has {len(steps)} steps, the reference {len(expected)}: {where}"
    for point, other in zip(curve, reference, strict=True):
        for name, value, wanted in zip(_CURVE, point, other, strict=True):
            if value != wanted:
                return f"step {point[0]}: {name} is {value!r}, {wanted!r} in the reference"
    return "the curves differ"


def steps_of(run: Path) -> int:
    """The last step in a run's metrics; 0 if there is none. A line that is just being written does not count."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if "lm loss" in point:
            return int(point["iteration"])
    return 0


def checkpoints_of(run: Path) -> list[int]:
    """Steps of a run's checkpoints, ascending: a folder has its name when it is complete."""
    names = (CHECKPOINT.fullmatch(path.name) for path in run.glob("iter_*"))
    return sorted(int(match[1]) for match in names if match)


def weights_of(run: Path, step: int) -> dict[str, str]:
    """sha256 of each file with tensors of a checkpoint, from its manifest."""
    manifest = json.loads((run / f"iter_{step:07d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".distcp")}


def resumed_steps(output: str) -> list[int]:
    """Steps after which a chain of jobs was resumed, in their order."""
    return [int(step) for step in RESUMED.findall(output)]


def judge_resumption(steps_done: int, resumed_at: int, complete: Sequence[int], limit: int) -> list[str]:
    """What is wrong with where a run went on.

    Args:
        steps_done: steps done when the attempt ended.
        resumed_at: step after which the next attempt began.
        complete: steps of the checkpoints that were complete when the fault came and must still count.
        limit: most steps that may be lost: those between two checkpoints.
    """
    problems = []
    newest = max(complete, default=0)
    if resumed_at < newest:
        problems.append(f"resumed after step {resumed_at}, though step {newest} was saved")
    if resumed_at > steps_done:
        problems.append(f"resumed after step {resumed_at}, of which only {steps_done} were in the metrics")
    if steps_done - resumed_at > limit:
        problems.append(f"{steps_done - resumed_at} steps were lost, {limit} lie between checkpoints")
    return problems


def read_outcomes(path: Path) -> list[Outcome]:
    """Rounds that were run already; a torn last line is left out."""
    outcomes = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return outcomes


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Add a line, after the end of a torn one."""
    is_torn = path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if is_torn else "") + json.dumps(asdict(outcome)) + "\n")


def table(outcomes: Iterable[Outcome], expected: Mapping[str, str]) -> str:
    """The rounds as a table in Markdown, a row for each fault."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.fault, []).append(outcome)
    lines = [
        "| fault | moments | expected | survived | detection, s | restarts | steps lost, most | curve identical |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fault in (name for name in expected if name in rows):
        rounds = rows[fault]
        detected = [seconds for outcome in rounds if (seconds := outcome.detection_seconds) is not None]
        cells = (
            fault,
            "; ".join(dict.fromkeys(outcome.moment for outcome in rounds)),
            expected[fault],
            f"{sum(outcome.survived for outcome in rounds)} of {len(rounds)}",
            _span(detected, "{:.1f}"),
            _span([outcome.num_restarts for outcome in rounds], "{}"),
            str(max(outcome.steps_lost for outcome in rounds)),
            f"{sum(outcome.is_curve_identical for outcome in rounds)} of {len(rounds)}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _span(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} to {most}"
