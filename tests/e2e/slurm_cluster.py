"""A real SLURM of two nodes on this machine, and what a person does with it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import REPOSITORY, command_environment

TOOL = REPOSITORY / "tools" / "local_slurm.sh"
NOT_INSTALLED = 3


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``tools/local_slurm.sh``; what its daemons inherit must not be a pipe that somebody waits for."""
    return subprocess.run([TOOL, *arguments], capture_output=True, text=True, timeout=400, check=False)


def processes_of(folder: Path) -> list[int]:
    """Numbers of all processes that name a cluster's folder, or belong to one of its jobs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes()
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            is_daemon = str(folder).encode() in text
            if text and (is_daemon or f"SLURM_CONF={folder}/slurm.conf".encode() in variables):
                found.append(int(entry.name))
    return found


class Cluster:
    """A cluster that is up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = command_environment() | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MEGAVLM_HOME": str(REPOSITORY),
            "PYTHON": sys.executable,
            "PREFLIGHT_SECONDS": "200",  # other tests may run beside
        }

    def run(self, *arguments: object, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of SLURM and return what it says."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment | variables,
            cwd=cwd,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def sbatch(self, cwd: Path, *arguments: object, **variables: str) -> "Job":
        """Submit a job from a folder of one's own, as somebody does who keeps data and runs there."""
        said = self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables)
        return Job(self, said.split()[-1].split(";")[0], cwd)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: str, cwd: Path) -> None:
        self.cluster = cluster
        self.number = number
        self.cwd = cwd

    @property
    def output(self) -> str:
        """What it has printed until now."""
        return "".join(path.read_text(errors="replace") for path in self.cwd.glob(f"*-{self.number}.txt"))

    def about(self, name: str) -> str:
        """A value of ``scontrol show job``, such as ``JobState``."""
        text = self.cluster.run("scontrol", "show", "job", self.number, "--oneliner")
        found = re.search(rf"\b{name}=(\S+)", text)
        assert found, text
        return found[1]

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait for something that the job does, and return for how long; it fails when the job ends before."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}\n{self.output}"
            state = self.about("JobState")
            assert state in ("PENDING", "RUNNING", "COMPLETING") or condition(), f"{state}: not {what}\n{self.output}"
            time.sleep(0.1)
        return time.monotonic() - started

    def wait(self, seconds: float) -> str:
        """Wait for its end and return its state."""
        deadline = time.monotonic() + seconds
        while (state := self.about("JobState")) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < deadline, f"{state} after {seconds} s:\n{self.output}"
            time.sleep(0.2)
        return state

    def find_rank(self, rank: int, verb: str) -> int | None:
        """Process number of a rank of ``megavlm VERB``; None if it does not run."""
        wanted = {f"SLURM_JOB_ID={self.number}".encode(), f"RANK={rank}".encode()}
        for number in processes_of(self.cluster.folder):
            try:
                variables = set(Path(f"/proc/{number}/environ").read_bytes().split(b"\0"))
                command = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted <= variables and [b"megavlm", verb.encode()] == command[2:4]:
                return number
        return None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two pretended GPUs each. Skips where SLURM is not installed and may not be."""
    folder = tmp_path_factory.mktemp("slurm")
    up = run_tool("up", f"dir={folder}", "nodes=2", "gpus=2", "idle_minutes=15")
    if up.returncode == NOT_INSTALLED:
        pytest.skip(up.stderr.strip())
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield Cluster(folder)
    finally:
        run_tool("down", f"dir={folder}")
    deadline = time.monotonic() + 10.0  # a killed process takes a moment to go
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(folder) == []
