"""Asks a run to stop at the end of the step: SIGTERM (schedulers), SIGINT (a person), SIGUSR1 (SLURM's --signal).

The handlers only set a flag. Ranks get signals at different moments, so whoever reads the flag has to agree on it over
the ranks before acting on it. Imports nothing of the project.
"""

import contextlib
import signal
import types
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    @property
    def name(self) -> str | None:
        """Name of the first signal that came, such as ``SIGTERM``; None if none did."""
        return self._signal.name if self._signal is not None else None

    def __bool__(self) -> bool:
        return self._signal is not None

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt  # a person who asks again does not want to wait for the step


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the stop signals while the block runs, and put the former handlers back after it.

    Must be entered in the main thread (Python handles signals there only). A second SIGINT raises KeyboardInterrupt.
    """
    request = StopRequest()
    former = {number: signal.signal(number, request._receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
