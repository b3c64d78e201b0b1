"""One round of ``tools/fault_campaign.py``: a job of ``slurm/nvlm_d.sh``, a moment, a fault, and what became of it."""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_campaign_cluster import GOING_ON, REPOSITORY, Cluster, Job, send_all
from fault_campaign_judge import (
    Outcome,
    Point,
    checkpoints_of,
    compare_curves,
    judge_resumption,
    read_curve,
    resumed_steps,
    steps_of,
    weights_of,
)

SCRIPT = REPOSITORY / "slurm" / "nvlm_d.sh"
RECIPE = REPOSITORY / "examples" / "nvlm" / "tiny.yaml"
TICK_SECONDS = 0.05
ATTEMPT = re.compile(r"attempt \d+ on ")


@dataclass(frozen=True)
class Settings:
    """What all rounds have in common, the reference run too."""

    data: Path
    """The quickstart's data."""
    steps: int
    save_interval: int
    patience: float
    """Seconds that a job may take from one thing to the next; a machine with other work needs more."""
    lost_seconds: float
    """``engine.lost_timeout_seconds``."""

    def overrides(self, run: Path) -> list[str]:
        """Overrides of the tiny recipe."""
        return [
            f"tokenizer.path={self.data}/tokenizer.model",
            f"data.train.path={self.data}/stage2_train.jsonl",
            "data.valid=null",
            # so that a resumed run needs the random number generators too
            "model.language.attention_dropout=0.1",
            "model.language.hidden_dropout=0.1",
            "training.global_batch_size=4",
            "training.micro_batch_size=2",
            f"training.train_iters={self.steps}",
            f"checkpoint.save_interval={self.save_interval}",
            f"checkpoint.save={run}",
            f"engine.lost_timeout_seconds={self.lost_seconds:g}",
            f"logging.log_interval={self.save_interval}",
        ]


class NotWithinError(Exception):
    """Something did not happen in the time that was given to it."""


class Round:
    """One round. Its fault calls these methods in its own order."""

    def __init__(self, outcome: Outcome, settings: Settings, cluster: Cluster, folder: Path) -> None:
        """Begin the round of ``outcome`` in ``folder``."""
        self.outcome = outcome
        self.settings = settings
        self.cluster = cluster
        self.folder = folder
        self.run = folder / "run"
        self.random = random.Random(f"{outcome.seed} {outcome.fault} {outcome.round}")
        self.jobs: list[Job] = []
        self.steps_done = 0
        self.complete: list[int] = []
        self._fault_at = 0.0
        self._attempts_before = 0
        self._is_watching = False
        self._next_question = 0.0

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, *overrides: str, options: tuple[str, ...] = (), max_restarts: int = 3) -> Job:
        """Submit the run, for the first time or again."""
        said = self.cluster.run(
            *("sbatch", "--parsable", *options, SCRIPT, *self.settings.overrides(self.run), *overrides),
            cwd=self.folder,
            RECIPE=str(RECIPE),
            MAX_RESTARTS=str(max_restarts),
        )
        self.jobs.append(Job(self.cluster, said.split()[-1].split(";")[0], self.folder))
        self.outcome.num_jobs = len(self.jobs)
        return self.jobs[-1]

    @property
    def job(self) -> Job:
        """The last one submitted."""
        return self.jobs[-1]

    @property
    def output(self) -> str:
        """What the jobs have printed, in their order."""
        return "".join(job.output for job in self.jobs)

    def wait(
        self, condition: Callable[[], bool], what: str, *, seconds: float = 0.0, tick: float = TICK_SECONDS
    ) -> None:
        """Wait for something, and note meanwhile how far the run is before it goes on elsewhere.

        Raises:
            NotWithinError: it did not happen within ``seconds`` (the settings' patience if 0).
        """
        deadline = time.monotonic() + (seconds or self.settings.patience)
        next_look = 0.0
        while not condition():
            now = time.monotonic()
            if now > deadline:
                raise NotWithinError(f"not within {seconds or self.settings.patience:.0f} s: {what}")
            if now > next_look:
                self._look()
                next_look = now + 0.5
            if now > self._next_question:
                self._ask_slurm()
                self._next_question = now + 3.0
            time.sleep(tick)
        self._look()

    def _look(self) -> None:
        if self._is_watching and len(ATTEMPT.findall(self.output)) == self._attempts_before:
            self.steps_done = max(self.steps_done, steps_of(self.run))

    def _ask_slurm(self) -> None:
        if self.jobs and self.job.release_if_held():
            self.outcome.problems.append("SLURM held the job: BadConstraints (released; see held_*.txt)")

    def wait_end(self) -> str:
        """Wait for the end of the last job; return its state."""
        state = ""

        def has_ended() -> bool:
            nonlocal state
            state = self.job.state
            return state not in GOING_ON

        self.wait(has_ended, "the end of the job", seconds=3.0 * self.settings.patience, tick=1.0)
        return state

    # ---- the moment --------------------------------------------------------------------------------------------------

    def wait_moment(self, kind: str, *, first: int = 1, last: int | None = None) -> dict[int, int]:
        """Wait for a random moment of the last job; returns the process numbers of its ranks.

        Args:
            kind: ``step`` (anywhere in or between steps), ``save`` (while a checkpoint is being written) or ``start``
                (from the start of the training processes on, before the first step as a rule).
            first, last: steps, of which ``step`` and ``save`` come at a random one or soon after.
        """
        last = self.settings.steps - self.settings.save_interval - 2 if last is None else last
        ranks: dict[int, int] = {}

        def find() -> bool:
            ranks.update(self.job.find_ranks())
            return len(ranks) == 2

        self.wait(find, "training", tick=0.2)
        if kind == "start":
            delay = self.random.uniform(0.0, 6.0)
            time.sleep(delay)
            self.outcome.moment = f"{delay:.1f} s after the ranks started"
            return ranks
        step = self.random.randint(first, last)
        self.wait(lambda: steps_of(self.run) >= step, f"step {step}", tick=0.01)
        if kind == "save":
            self.wait(lambda: any(self.run.glob("iter_*.writing-*")), f"a save after step {step}", tick=0.002)
            time.sleep(self.random.uniform(0.0, 0.15))
            self.outcome.moment = f"in a save, step {steps_of(self.run)}"
        else:
            time.sleep(self.random.uniform(0.0, 0.2))
            self.outcome.moment = f"step {steps_of(self.run) + 1}"
        return ranks

    def note_fault(self) -> None:
        """The fault happens now."""
        self._fault_at = time.monotonic()
        self._attempts_before = len(ATTEMPT.findall(self.output))
        self._is_watching = True
        self.complete = checkpoints_of(self.run)
        self.steps_done = steps_of(self.run)

    def seconds_since_fault(self) -> float:
        """Seconds since :meth:`note_fault`."""
        return time.monotonic() - self._fault_at

    def expect_line(self, pattern: str, *, start: int = 0) -> str:
        """Wait until the jobs' output has a line with ``pattern`` behind ``start``; note it and the seconds it took."""
        found: re.Match[str] | None = None

        def is_there() -> bool:
            nonlocal found
            found = re.search(pattern, self.output[start:])
            return found is not None

        self.wait(is_there, f"a line with {pattern!r}")
        assert found is not None
        text = self.output[start:]
        begin, end = text.rfind("\n", 0, found.start()) + 1, text.find("\n", found.end())
        self.outcome.said = text[begin : end if end >= 0 else None].strip()[:500]
        if self.outcome.detection_seconds is None:
            self.outcome.detection_seconds = round(self.seconds_since_fault(), 1)
        return self.outcome.said

    # ---- the end -----------------------------------------------------------------------------------------------------

    def check_resumption(self, limit: int | None = None) -> None:
        """Compare where the run went on with what was done and saved when the fault came."""
        resumed = resumed_steps(self.output)
        resumed_at = resumed[0] if resumed else 0
        self.outcome.steps_lost = self.steps_done - resumed_at
        limit = self.settings.save_interval if limit is None else limit
        self.outcome.problems += judge_resumption(self.steps_done, resumed_at, self.complete, limit)

    def check_end(self, reference: list[Point], reference_weights: dict[str, str]) -> None:
        """Compare the finished run with the one that nothing disturbed."""
        outcome = self.outcome
        outcome.end = self.job.state
        outcome.num_restarts = sum(int(job.about("Restarts")[0] or 0) for job in self.jobs)
        if outcome.end != "COMPLETED":
            outcome.problems.append(f"the job ended as {outcome.end}")
            return
        try:
            difference = compare_curves(read_curve(self.run / "metrics.jsonl"), reference)
        except (OSError, ValueError) as error:
            difference = str(error)
        outcome.is_curve_identical = difference is None
        outcome.are_weights_identical = weights_of(self.run, self.settings.steps) == reference_weights
        if difference is not None:
            outcome.problems.append(difference)
        if not outcome.are_weights_identical:
            outcome.problems.append("weights or optimizer differ from the reference's")
        if left := [path.name for path in self.run.glob("iter_*.*")]:
            expected = [name for name in left if ".damaged-" in name]
            if left != expected:
                outcome.problems.append(f"left behind: {', '.join(left)}")

    def clean(self) -> None:
        """Remove what takes room in the folder of a round that was survived."""
        for path in [*self.run.glob("iter_*"), *self.run.glob("tensorboard"), self.cluster.folder / "state"]:
            shutil.rmtree(path, ignore_errors=True)


def freeze(ranks: dict[int, int]) -> None:
    """Stop all ranks, as a suspended job is."""
    send_all(ranks, signal.SIGSTOP)


def thaw(ranks: dict[int, int]) -> None:
    """Let them go on."""
    send_all(ranks, signal.SIGCONT)
