"""Runs ``megavlm`` commands as processes of their own, as a person would."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megavlm.runtime.signals import stop_on_signals

_POLL_SECONDS = 0.2
_TAIL_LINES = 20


class RunError(RuntimeError):
    """A run did not come to its end."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(name: str, arguments: Sequence[str], output: Path | None) -> None:
    """Run ``megavlm ARGUMENTS`` to its end.

    A signal that asks to stop lets the child save what it has: SIGINT reaches it from the terminal, others are passed
    on to it.

    Args:
        name: of the run, in errors.
        arguments: of the command.
        output: file that its output is added to; None: it goes where ours goes.

    Raises:
        RunError: it failed, or was asked to stop.
    """
    command = [sys.executable, "-m", "megavlm", *arguments]
    if output is None:
        return _wait(name, subprocess.Popen(command), None)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        return _wait(name, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT), output)


def _wait(name: str, child: subprocess.Popen[bytes], output: Path | None) -> None:
    with stop_on_signals() as stop:
        is_told = False
        while child.poll() is None:
            if stop and stop.name != "SIGINT" and not is_told:
                child.send_signal(signal.Signals[stop.name or "SIGTERM"])
                is_told = True
            try:
                child.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    if stop:
        number = signal.Signals[stop.name or "SIGTERM"].value
        raise RunError(f"{name}: stopped by {stop.name}. The same command goes on with it.", 128 + number)
    if child.returncode:
        code = child.returncode if child.returncode > 0 else 128 - child.returncode  # as a shell says a signal
        told = "Its output is above." if output is None else f"The end of {output}:\n{_tail(output)}"
        raise RunError(f"{name}: failed with exit code {code}. {told}", code)


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return os.linesep.join(lines[-_TAIL_LINES:])
