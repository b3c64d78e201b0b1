"""The local SLURM of ``tools/fault_campaign.py``: a cluster of its own for each round, its jobs, nodes and ranks."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOOL = REPOSITORY / "tools" / "local_slurm.sh"
NODES = ("n1", "n2")
GOING_ON = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "STOPPED", "SUSPENDED")
COMMAND_SECONDS = 120.0
HELD = "BadConstraints"


def check_installed() -> None:
    """Leave the program if there is no SLURM on this machine."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        print(
            f"fault_campaign: SLURM is not installed on this machine ({', '.join(missing)} not found). Install it as "
            f"root: {TOOL.relative_to(REPOSITORY)} install",
            file=sys.stderr,
        )
        sys.exit(3)


class Cluster:
    """Two nodes on the loopback interface, from ``tools/local_slurm.sh``. A context manager: it ends in any case."""

    def __init__(self, folder: Path) -> None:
        """Describe a cluster that lies in ``folder``."""
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MEGAVLM_"))}
        self.environment = kept | {
            "PATH": kept.get("PATH", "") + ":/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MEGAVLM_HOME": str(REPOSITORY),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PREFLIGHT_SECONDS": "300",  # the machine may have other work
            "RANKS_PER_NODE": "1",
            "END_SECONDS": "20",
        }

    def __enter__(self) -> "Cluster":
        try:
            self._tool("up", f"nodes={len(NODES)}", "idle_minutes=15")
        except BaseException:
            self._tool("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._tool("down")

    def _tool(self, verb: str, *settings: str) -> None:
        # its daemons inherit what it writes to: a file, not a pipe that somebody would wait for
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "local_slurm.txt").open("a") as output:
            command = [str(TOOL), verb, f"dir={self.folder}", *settings]
            status = subprocess.run(command, stdout=output, stderr=output, timeout=300, check=False).returncode
        if status and verb == "up":
            raise RuntimeError(f"{self.folder}/local_slurm.txt: the cluster did not start (exit status {status}).")

    def run(self, *arguments: object, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of SLURM and return what it says.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            env=self.environment | variables,
            cwd=cwd,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment of every process that belongs to a job or daemon of this cluster, by its number."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found[int(entry.name)] = variables
        return found

    def kill_node(self, node: str) -> int:
        """Take a node away as a loss of power does: slurmd, its stepds, all that they started. Returns how many."""
        # whoever could tell the controller about the death of another goes first
        victims = [int((self.folder / "run" / f"slurmd.{node}.pid").read_text())]
        processes, started = self.processes(), []
        for number, variables in processes.items():
            if variables.get("SLURMD_NODENAME") == node and "SLURM_JOB_ID" in variables:
                started.append(number)
                parent = _parent(number)
                while parent in processes:
                    if "slurmstepd" in _command(parent):
                        victims.append(parent)
                    parent = _parent(parent)
        victims += started
        victims = list(dict.fromkeys(victims))
        for number in victims:
            _send(number, signal.SIGKILL)
        return len(victims)

    def set_down(self, node: str) -> None:
        """Take a node out of service, as an administrator does."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=campaign")

    def resume_node(self, node: str) -> None:
        """Put it into service again; it may have come back by itself (ReturnToService=2)."""
        if "DOWN" in self.run("sinfo", "--noheader", "--Node", "--nodes", node, "--format=%T").upper():
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node that was killed."""
        subprocess.run(
            ["slurmd", "-c", "-N", node, "-f", self.environment["SLURM_CONF"]],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
            check=True,
        )


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, number: str, cwd: Path) -> None:
        """Take a job that was submitted in the folder ``cwd``."""
        self.cluster = cluster
        self.number = number
        self.cwd = cwd
        self._known = ""

    @property
    def output(self) -> str:
        """What it has printed until now."""
        return "".join(path.read_text(errors="replace") for path in self.cwd.glob(f"*-{self.number}.txt"))

    def about(self, *names: str) -> list[str]:
        """Values of ``scontrol show job``, such as ``JobState``."""
        try:
            self._known = self.cluster.run("scontrol", "show", "job", self.number, "--oneliner")
        except RuntimeError:
            if not self._known:
                raise  # else SLURM has forgotten it, as it does five minutes after its end
        return [found[1] if (found := re.search(rf"\b{name}=(\S+)", self._known)) else "" for name in names]

    @property
    def state(self) -> str:
        """``JobState``."""
        return self.about("JobState")[0]

    def find_ranks(self) -> dict[int, int]:
        """Process numbers of the ranks that train, by rank."""
        ranks = {}
        for number, variables in self.cluster.processes().items():
            is_rank = variables.get("SLURM_JOB_ID") == self.number and "RANK" in variables
            if is_rank and _command(number).split("\0")[2:4] == ["megavlm", "train"]:
                ranks[int(variables["RANK"])] = number
        return ranks

    def release_if_held(self) -> bool:
        """Release it if SLURM holds it because of ``BadConstraints``, and keep what SLURM knows of the cluster then."""
        state, reason = self.about("JobState", "Reason")
        if state != "PENDING" or reason != HELD:
            return False
        texts = [self.cluster.run("scontrol", "show", kind) for kind in ("job", "node")]
        log = (self.cluster.folder / "log" / "slurmctld.log").read_text(errors="replace")
        (self.cwd / f"held_{time.time():.0f}.txt").write_text("\n".join([*texts, log]))
        self.cluster.run("scontrol", "release", self.number)
        return True


def send_all(numbers: dict[int, int], what: signal.Signals) -> None:
    """Send a signal to processes; those that are gone do not matter."""
    for number in numbers.values():
        _send(number, what)


def _send(number: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, what)


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
