"""The ``megavlm`` command as a process, and what it leaves."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import FORKS

REPOSITORY = Path(__file__).parents[2]


def command_environment() -> dict[str, str]:
    """The environment of a fresh shell: one thread a rank, no launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    """The command line of ``megavlm ARGUMENTS``."""
    return [sys.executable, "-m", "megavlm", *map(str, arguments)]


def run_warm(arguments: Sequence[object], folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``megavlm ARGUMENTS`` in a folder, in a process that is forked from one that has imported already.

    Saves the seconds that the command takes to start; what it does, and how it ends, is the same. Ranks that it starts
    are fresh processes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output"
        output.touch()
        process = FORKS.Process(
            target=_be_command, args=([*map(str, arguments)], folder, output, command_environment())
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(command(*arguments), timeout, output.read_text(encoding="utf-8"))
        return subprocess.CompletedProcess(command(*arguments), process.exitcode, output.read_text(encoding="utf-8"))


def _be_command(arguments: list[str], folder: Path, output: Path, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # it would start its own children as it was started itself
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["megavlm", *arguments]
    runpy.run_module("megavlm", run_name="__main__")


def losses(run_folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step in a run's metrics, exactly as written."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    return [(point["iteration"], point["lm loss"], point["grad norm"]) for point in points if "lm loss" in point]


def assert_one_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed with one line that says why, and no traceback."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stdout, result.stdout
    for word in words:
        assert word in result.stdout, result.stdout
