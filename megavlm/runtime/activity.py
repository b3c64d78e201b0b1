"""What this process is doing, for those who wait for it: one process-wide note that the main thread keeps up to date.

Imports nothing of the project.
"""

import time
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """The parts of a step, in their order, and what happens between steps."""

    STARTING = "starting"
    READING = "reading data"
    COMPARING = "comparing the step with the other ranks"
    COMPUTING = "forward and backward"
    UPDATING = "updating the weights"
    REPORTING = "reporting the step"
    VALIDATING = "validating"
    SAVING = "saving"
    LOADING = "loading a checkpoint"
    ENDING = "ending"


PHASES = tuple(Phase)


@dataclass(frozen=True)
class Moment:
    """What a process was doing at some time."""

    step: int
    """Number of the step that it works on, from 1; 0 before the first."""
    phase: Phase
    part: int
    """What it has begun within the phase: micro-batches of a step, batches of a validation."""
    since: float
    """When it last got anywhere (``time.monotonic`` of its own machine)."""

    @property
    def place(self) -> tuple[int, int, int]:
        """Who is behind has the smaller one."""
        return self.step, PHASES.index(self.phase), self.part


class Activity:
    """The note. Written by the main thread, read by any."""

    def __init__(self) -> None:
        self.now = Moment(0, Phase.STARTING, 0, time.monotonic())
        """The latest moment; replaced as a whole, so a reader sees no half of one."""

    def begin(self, phase: Phase, step: int | None = None) -> None:
        """A phase has begun, and the one before it is done.

        Args:
            phase: what is done now.
            step: of which step; None: of the same.
        """
        self.now = Moment(self.now.step if step is None else step, phase, 0, time.monotonic())

    def advance(self) -> None:
        """Something within the phase is done: a micro-batch, a batch of validation, a file."""
        now = self.now
        self.now = Moment(now.step, now.phase, now.part + 1, time.monotonic())


ACTIVITY = Activity()
"""Of this process."""
