"""Workers outlive the signals that a launcher sends to a process group, and end with the process they work for."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megavlm.data.worker import start_loading


class Doubles(torch.utils.data.Dataset[int]):
    """Gives twice the number."""

    def __getitem__(self, number: int) -> int:
        time.sleep(0.01)
        return 2 * number


def load(num_steps: int) -> torch.utils.data.DataLoader[int]:
    return start_loading(Doubles(), range(num_steps), num_workers=2, timeout_seconds=60)


def workers_of(parent: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_a_signal_from_elsewhere_does_not_end_a_worker(name: str) -> None:
    before = set(workers_of(os.getpid()))
    answers = iter(load(60))  # they may not have begun yet
    workers = set(workers_of(os.getpid())) - before
    assert len(workers) == 2
    subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    got = list(answers)
    assert got == [2 * number for number in range(60)]
    del answers


def test_its_own_process_can_end_a_worker() -> None:
    before = set(workers_of(os.getpid()))
    loader = load(1000)
    answers = iter(loader)
    next(answers)
    workers = set(workers_of(os.getpid())) - before
    for worker in workers:
        os.kill(worker, signal.SIGTERM)  # as the DataLoader does with a worker that hangs
    wait_until(lambda: not workers & set(workers_of(os.getpid())))


def test_workers_end_with_a_killed_process(tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        answers = iter(load(100000))
        next(answers)
        (tmp_path / "workers").write_text(" ".join(map(str, workers_of(os.getpid()))))
        (tmp_path / "ready").touch()
        time.sleep(60)
        os._exit(1)
    wait_until((tmp_path / "ready").exists)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 2
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
