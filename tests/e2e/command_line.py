"""The ``megavlm`` command as a process, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def command_environment() -> dict[str, str]:
    """The environment of a fresh shell: one thread a rank, no launcher's variables."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    """The command line of ``megavlm ARGUMENTS``."""
    return [sys.executable, "-m", "megavlm", *map(str, arguments)]


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
