"""``tools/local_slurm.sh``: clusters that do not disturb each other and leave nothing behind."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from command_line import command_environment
from slurm_cluster import NOT_INSTALLED, TOOL, processes_of, run_tool

pytestmark = pytest.mark.timeout(600)


def up(folder: Path, *settings: str) -> str:
    done = run_tool("up", f"dir={folder}", *settings)
    if done.returncode == NOT_INSTALLED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def slurm(folder: Path, *command: str) -> str:
    environment = command_environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def wait_until_gone(folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_two_clusters_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    try:
        started = time.monotonic()
        said = up(first)
        seconds = time.monotonic() - started
        assert f"export SLURM_CONF={first}/slurm.conf" in said
        assert seconds < 30.0 or "installing" in said
        up(second, "nodes=4", "gpus=3")
        assert slurm(first, "srun", "--nodes=2", "printenv", "SLURMD_NODENAME").split() in (["n1", "n2"], ["n2", "n1"])
        assert sorted(slurm(second, "srun", "--nodes=4", "printenv", "SLURMD_NODENAME").split()) == [
            "n1",
            "n2",
            "n3",
            "n4",
        ]
        gpus = slurm(second, "srun", "--gpus-per-node=3", "printenv", "SLURM_GPUS_ON_NODE")
        assert gpus.strip() == "3"
        assert "is up already" in run_tool("up", f"dir={first}").stdout

        slurm(first, "sbatch", "--wrap", "srun sleep 600 & sleep 600")
        time.sleep(1.0)
        assert "wrap" in run_tool("status", f"dir={first}").stdout
        run_tool("down", f"dir={first}")
        wait_until_gone(first, 5.0)  # the job too
        status = run_tool("status", f"dir={first}")
        assert (status.returncode, status.stderr) == (1, f"local_slurm: is not up in {first}.\n")
        assert "n4 idle" in run_tool("status", f"dir={second}").stdout  # the other one goes on

        shutil.rmtree(second)  # as a test run's folder is removed: its daemons do not stay
        wait_until_gone(second, 60.0)
    finally:
        for folder in (first, second):
            run_tool("down", f"dir={folder}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "nodes=0"], "nodes=0: must be from 1 to 64"),
        (["up", "nodes=many"], "nodes=many: must be a whole number"),
        (["up", "nodes"], "tools/local_slurm.sh up"),
        (["start"], "tools/local_slurm.sh up"),
        ([], "tools/local_slurm.sh up"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    done = subprocess.run([TOOL, *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_where_it_is_not_installed_it_says_the_command(tmp_path: Path) -> None:
    """With a path that holds neither SLURM nor apt-get."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("bash", "env", "id", "realpath", "sed", "dirname"):
        (bin_folder / name).symlink_to(shutil.which(name) or name)
    tool = tmp_path / "tool.sh"
    tool.write_text(TOOL.read_text().replace("PATH=$PATH:/usr/sbin:/sbin", ""))
    tool.chmod(0o755)
    done = subprocess.run(
        [tool, "up", f"dir={tmp_path / 'c'}"],
        env={"PATH": str(bin_folder)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == NOT_INSTALLED, done.stderr
    assert "Run as root: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client" in done.stderr
