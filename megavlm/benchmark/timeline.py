"""Divides time among labels without a gap: at each moment exactly one label holds, so the parts add up to the whole.

On a CUDA device the clock is the stream that computes: a label's time is what lies between the moments in which that
stream got to its begin and to its end. So a wait of the stream for a collective counts, and communication that runs
beside a computation does not. On a CPU the clock is the main thread's. Nothing is synchronized in between.
"""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator

import torch

OTHER = "other"
"""What holds where nothing else does."""


class Timeline:
    """Use: :meth:`start`, :meth:`switch` and :meth:`during`, :meth:`stop`; again and again. Between stop and start
    switching does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.label: str | None = None
        """What holds now; None: not started."""

    def start(self) -> None:
        """Begin with :data:`OTHER`."""
        assert self.label is None, "stop comes first"
        self._marks = [(OTHER, self._now())]
        self.label = OTHER

    def switch(self, label: str) -> str | None:
        """From now on ``label`` holds. Return what held before."""
        before = self.label
        if before is not None and before != label:
            self._marks.append((label, self._now()))
            self.label = label
        return before

    @contextlib.contextmanager
    def during(self, label: str) -> Iterator[None]:
        """``label`` holds while the block runs, but for what it switches to itself; then again what held before."""
        before = self.switch(label)
        try:
            yield
        finally:
            if before is not None:
                self.switch(before)

    def stop(self) -> Counter[str]:
        """End, and return the seconds of each label since the start. Waits for the device."""
        assert self.label is not None, "start comes first"
        marks = [*self._marks, ("", self._now())]
        self._marks, self.label = [], None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: Counter[str] = Counter()
        for (label, begin), (_, end) in itertools.pairwise(marks):
            seconds[label] += _between(begin, end)  # type: ignore[assignment]
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1e3
