"""Asks a run to stop at the end of the step: SIGTERM (schedulers), SIGINT (a person), SIGUSR1 (SLURM's --signal).

The handlers only set a flag. Ranks get signals at different moments, so whoever reads the flag has to agree on it over
the ranks before acting on it. Imports nothing of the project.
"""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GROUP_SIGNALS = {*STOP_SIGNALS, signal.SIGUSR2}
_SECONDS_BETWEEN_LOOKS = 2.0  # of a child for its parent


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


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started in the block hear no signal that a launcher sends to the whole process group.

    For what works for this process until it has finished its step and saved. Such a process calls
    :func:`hear_parent_only` when it has begun.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_parent_only() -> None:
    """Make this child process end when its parent sends SIGTERM or is gone, and stay deaf to everybody else.

    SIGTERM is also how a parent ends a child that does not end by itself. Only the sender tells one from the other, and
    only to a thread that waits for the signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="SIGTERM", daemon=True).start()


def _end_with(parent: int) -> None:
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, _SECONDS_BETWEEN_LOOKS)
        if os.getppid() != parent or (received is not None and received.si_pid == parent):
            os._exit(0)
