"""Runs ``megavlm`` commands as processes of their own, as a person would."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megavlm.runtime.signals import StopRequest, stop_on_signals

_POLL_SECONDS = 0.2
_TAIL_LINES = 20
_GRACE_SECONDS = 45.0
"""Longer than torchrun and SLURM wait (30 s) before they kill ranks that do not end."""
_MARK = "MEGAVLM_STARTED_BY"
"""Environment variable of what is started here: the number of this process."""


class RunError(RuntimeError):
    """A run did not come to its end."""

    def __init__(self, message: str, exit_code: int, *, is_asked: bool = False) -> None:
        """Args:
        message: what happened.
        exit_code: as a shell says it.
        is_asked: whether somebody asked this process to stop.
        """
        super().__init__(message)
        self.exit_code = exit_code
        self.is_asked = is_asked


class TimeLimitError(RunError):
    """A run took longer than it was given."""


def run_command(name: str, arguments: Sequence[str], output: Path | None) -> None:
    """Run ``megavlm ARGUMENTS`` to its end; see :func:`run_process`."""
    run_process(name, [sys.executable, "-m", "megavlm", *arguments], output)


def run_process(
    name: str,
    command: Sequence[str],
    output: Path | None,
    *,
    limit_seconds: float | None = None,
    has_to_save: bool = True,
) -> None:
    """Run a command to its end.

    Args:
        name: of the run, in errors.
        command: and its arguments.
        output: file that its output is added to; None: it goes where ours goes.
        limit_seconds: after which it is ended, with all that it started; None: never.
        has_to_save: whether a signal that asks to stop lets the child save what it has, and end by itself: SIGINT
            reaches it from the terminal, others are passed on to it. Else it is ended.

    Raises:
        RunError: it failed, or was asked to stop.
        TimeLimitError: it took longer than ``limit_seconds``.
    """
    with contextlib.ExitStack() as stack:
        file = None
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(output.open("ab"))
        stop = stack.enter_context(stop_on_signals())  # before there is a child to tell
        child = _start(command, file)
        is_late = _wait(child, stop, limit_seconds, has_to_save)
    if stop:
        number = signal.Signals[stop.name or "SIGTERM"].value
        message = f"{name}: stopped by {stop.name}. The same command goes on with it."
        raise RunError(message, 128 + number, is_asked=True)
    if is_late:
        raise TimeLimitError(f"{name}: was ended after its time limit of {limit_seconds:g} s.", 128 + signal.SIGTERM)
    if child.returncode:
        code = child.returncode if child.returncode > 0 else 128 - child.returncode  # as a shell says a signal
        told = "Its output is above." if output is None else f"The end of {output}:\n{_tail(output)}"
        raise RunError(f"{name}: failed with exit code {code}. {told}", code)


def _start(command: Sequence[str], output: BinaryIO | None) -> subprocess.Popen[bytes]:
    environment = os.environ | {_MARK: str(os.getpid())}
    errors = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, stdout=output, stderr=errors, env=environment)


def _wait(child: subprocess.Popen[bytes], stop: StopRequest, limit_seconds: float | None, has_to_save: bool) -> bool:
    """Wait for its end, and return whether it had to be ended because it took too long."""
    deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
    is_told = False
    while child.poll() is None:
        if stop and not has_to_save:
            _end(child)
        elif stop and stop.name != "SIGINT" and not is_told:
            child.send_signal(signal.Signals[stop.name or "SIGTERM"])
            is_told = True
        if deadline is not None and time.monotonic() > deadline:
            _end(child)
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_SECONDS)
    return False


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, as launchers do with their ranks; what is still there later is killed."""
    family = [child.pid, *_descendants(child.pid)]
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_SECONDS)
    family += _descendants(child.pid) if child.poll() is None else []
    for number in family[1:]:
        _kill(number)
    child.kill()
    child.wait()


def _kill(number: int) -> None:
    """Kill a process that was started from here. Its number may belong to another by now, which has no such mark."""
    with contextlib.suppress(OSError):
        environment = Path(f"/proc/{number}/environ").read_bytes()
        if f"{_MARK}={os.getpid()}".encode() in environment.split(b"\0"):
            os.kill(number, signal.SIGKILL)


def _descendants(number: int) -> list[int]:
    """Processes that it started, and those that they started. Empty where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, left = [], [number]
    while left:
        new = children.get(left.pop(), [])
        found += new
        left += new
    return found


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return os.linesep.join(lines[-_TAIL_LINES:])
