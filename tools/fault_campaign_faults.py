"""The faults of ``tools/fault_campaign.py``: how each is made, and what is expected then."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_campaign_cluster import send_all
from fault_campaign_judge import checkpoints_of, resumed_steps
from fault_campaign_round import Round, freeze, thaw

CHECKPOINT_BYTES = 7_700_000
"""Of the tiny recipe."""
DISK_BYTES = 6 * CHECKPOINT_BYTES
NO_SIGN = {
    0: r"Rank 0 \(\S+\) has given no sign of life for \d+ s|store of the run, which rank 0 or its launcher keeps, is",
    1: r"Rank 1 \(\S+\) has given no sign of life for \d+ s",
}
"""How the other rank says that one has stopped, by rank; rank 0 keeps the store."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    expected: str
    moments: tuple[str, ...]
    """Kinds of moments, one for each round in turn."""
    play: Callable[[Round, str], None]
    """Makes the fault in a round, at a moment of a kind, and waits until the run is done."""


def time_limit(this: Round, kind: str) -> None:
    """SLURM's warning before the time limit. It looks at limits every 30 s, so the ranks stand still until then."""
    job = this.submit(options=("--time=60",))
    ranks = this.wait_moment(kind)
    freeze(ranks)
    try:
        this.note_fault()
        elapsed = job.about("RunTime")[0]
        hours, minutes = map(int, elapsed.split(":")[:2])
        this.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={hours * 60 + minutes + 2}")
        this.expect_line("got SIGUSR1: the ranks finish their step")
    finally:
        thaw(ranks)
    this.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    thawed_at = this.seconds_since_fault()
    this.outcome.detection_seconds = None
    this.expect_line(r"stopped after step \d+ of \d+: requeued")
    this.outcome.detection_seconds = round(this.seconds_since_fault() - thawed_at, 1)
    this.wait_end()
    this.check_resumption(limit=0)


def scancel(this: Round, kind: str) -> None:
    """``scancel``, then the same command again."""
    job = this.submit()
    this.wait_moment(kind)
    this.note_fault()
    this.cluster.run("scancel", job.number)
    state = this.wait_end()
    this.outcome.detection_seconds = round(this.seconds_since_fault(), 1)
    if state != "CANCELLED":
        this.outcome.problems.append(f"the job that was cancelled is {state}")
    this.submit()
    this.wait_end()
    this.check_resumption()
    words = [line for line in job.output.splitlines() if "stopping after step" in line or "cancelled after" in line]
    this.outcome.said = words[-1] if words else "CANCELLED"


def kill_rank(this: Round, kind: str) -> None:
    """``kill -9`` of one of the ranks."""
    this.submit()
    ranks = this.wait_moment(kind)
    victim = this.random.choice(sorted(ranks))
    this.outcome.moment += f", rank {victim}"
    this.note_fault()
    send_all({victim: ranks[victim]}, signal.SIGKILL)
    said = this.expect_line(rf"task {victim}: Killed|Rank {victim} \(\S+\) has given no sign of life")
    this.expect_line(r"crash 1, of which MAX_RESTARTS=3 are forgiven; last saved step \d+: requeued")
    this.outcome.said = said
    this.wait_end()
    this.check_resumption()


def stop_rank(this: Round, kind: str) -> None:
    """SIGSTOP of one of the ranks, for ever."""
    this.submit()
    ranks = this.wait_moment(kind)
    victim = this.random.choice(sorted(ranks))
    this.outcome.moment += f", rank {victim}"
    this.note_fault()
    send_all({victim: ranks[victim]}, signal.SIGSTOP)
    try:
        said = this.expect_line(NO_SIGN[victim])
        this.expect_line(r"crash 1, of which MAX_RESTARTS=3 are forgiven")
        this.outcome.said = said
    finally:
        if this.outcome.detection_seconds is None:
            send_all({victim: ranks[victim]}, signal.SIGKILL)
    this.wait_end()
    this.check_resumption()


def node_down(this: Round, kind: str) -> None:
    """A node goes: its power, so that nothing of it is left, or set down by an administrator. It comes back later."""
    job = this.submit()
    this.wait_moment(kind)
    node = this.random.choice(("n1", "n2"))
    is_power = this.outcome.round % 3 != 2
    seconds_away = this.random.uniform(1.0, 25.0)
    how = "killed" if is_power else "set down"
    this.outcome.moment += f", {node} {how} for {seconds_away:.0f} s"
    this.note_fault()
    if is_power:
        this.cluster.kill_node(node)
    else:
        this.cluster.set_down(node)
    comes_back = time.monotonic() + seconds_away
    first_words = len(this.output)

    def is_noticed() -> bool:
        output = this.output[first_words:]
        words = ("looking for the rank that is gone" in output) or ("has given no sign" in output)
        if this.outcome.detection_seconds is None and (words or job.state != "RUNNING"):
            this.outcome.detection_seconds = round(this.seconds_since_fault(), 1)
        return this.outcome.detection_seconds is not None

    this.wait(lambda: (is_noticed() or True) and time.monotonic() > comes_back, "the end of the pause")
    if is_power:
        this.cluster.start_node(node)
    else:
        this.cluster.resume_node(node)
    this.wait(is_noticed, "anybody to notice")
    this.wait_end()
    lines = this.output[first_words:].splitlines()
    told = [line for line in lines if "NODE FAILURE" in line or "has given no sign" in line or "is gone" in line]
    this.outcome.said = told[0][:500] if told else "requeued by SLURM"
    this.check_resumption()


@contextlib.contextmanager
def small_disk(this: Round) -> Iterator[None]:
    """A small file system for the run folder, while the block lasts.

    Raises:
        PermissionError: this user may not mount one.
    """
    if os.geteuid() != 0:
        raise PermissionError("full_disk mounts a small tmpfs as the run folder, which only root may.")
    this.run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(this.run)], check=True)
    try:
        yield
    finally:
        kept = this.folder / "run_kept"
        kept.mkdir()
        for name in ("metrics.jsonl", "log.txt"):
            if (this.run / name).exists():
                shutil.copyfile(this.run / name, kept / name)
        subprocess.run(["umount", "-l", str(this.run)], check=False)


def _fill(filler: Path, free: int) -> None:
    """Take all room of a file system but ``free`` bytes."""
    room = shutil.disk_usage(filler.parent).free - free
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while room > 0:
            room -= file.write(b"x" * min(room, 2**20))


def full_disk(this: Round, kind: str) -> None:
    """The disk of the run folder fills up, at a random moment and to a random byte; later there is room again."""
    this.submit()
    this.wait_moment(kind, first=this.settings.save_interval + 1)
    free = 0 if this.outcome.round % 3 == 0 else int(this.random.uniform(0.05, 0.95) * CHECKPOINT_BYTES)
    filler = this.run / "filler"
    this.note_fault()
    _fill(filler, free)
    this.outcome.moment += f", {free} bytes left"
    this.expect_line(rf"error: .*{this.run}.*no space left on the disk.*[Mm]ake room")
    time.sleep(this.random.uniform(0.0, 20.0))
    intact = checkpoints_of(this.run)
    if lost := [step for step in this.complete[-1:] if step not in intact]:
        this.outcome.problems.append(f"the checkpoint of step {lost[0]} is gone")
    filler.unlink()
    if this.wait_end() != "COMPLETED":
        this.outcome.remarks.append("the job gave up while the disk was full; submitted again")
        this.submit()
        this.wait_end()
    this.check_resumption()
    if "Traceback" in this.output:
        this.outcome.problems.append("a traceback was printed")


def _stop_and_damage(this: Round, kind: str) -> tuple[Path, str]:
    """Cancel the run at a random moment; change one file of its newest checkpoint. Returns the checkpoint and what."""
    job = this.submit()
    this.wait_moment(kind, first=2 * this.settings.save_interval + 1)
    this.cluster.run("scancel", job.number)
    this.wait_end()
    newest = this.run / f"iter_{checkpoints_of(this.run)[-1]:07d}"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = this.random.choice(files)
    content = bytearray(file.read_bytes())
    place = this.random.randrange(len(content))
    if this.random.random() < 0.5:
        what = f"{file.relative_to(newest)} cut to {place} of {len(content)} bytes"
        file.write_bytes(content[:place])
    else:
        bit = this.random.randrange(8)
        what = f"bit {bit} of byte {place} of {file.relative_to(newest)} flipped"
        content[place] ^= 1 << bit
        file.write_bytes(content)
    this.outcome.moment = f"{newest.name}: {what}"
    return newest, what


def damaged(this: Round, kind: str) -> None:
    """A file of the newest checkpoint is damaged: the run refuses, and goes on when that checkpoint is moved away."""
    newest, _ = _stop_and_damage(this, kind)
    this.note_fault()
    older = checkpoints_of(this.run)[:-1]
    job = this.submit(max_restarts=0)
    this.expect_line(rf"error: \S*{newest.name}\S*: .* is intact: move {newest.name} out of")
    if (state := this.wait_end()) != "FAILED":
        this.outcome.problems.append(f"the job with the damaged checkpoint is {state}")
    if "Traceback" in job.output:
        this.outcome.problems.append("a traceback was printed")
    newest.rename(this.folder / newest.name)
    this.complete = older
    this.submit()
    this.wait_end()
    this.check_resumption(limit=2 * this.settings.save_interval)


def damaged_fall_back(this: Round, kind: str) -> None:
    """The same with ``checkpoint.fall_back=true``: the run goes on from the one before by itself."""
    newest, _ = _stop_and_damage(this, kind)
    this.note_fault()
    this.complete = checkpoints_of(this.run)[:-1]
    this.submit("checkpoint.fall_back=true", max_restarts=0)
    this.expect_line(rf"warning: \S*{newest.name}\S*: .*checkpoint\.fall_back")
    this.wait_end()
    this.check_resumption(limit=2 * this.settings.save_interval)
    if resumed_steps(this.output)[-1:] != this.complete[-1:]:
        this.outcome.problems.append(f"it went on after {resumed_steps(this.output)}, not after {this.complete[-1:]}")


FAULTS = {
    "time_limit": Fault("saves, is requeued, loses no step", ("step", "save", "step"), time_limit),
    "scancel": Fault(
        "saves if KillWait is enough, ends; resumes when submitted again", ("save", "step", "start"), scancel
    ),
    "kill_rank": Fault("the rank is named; requeued from the newest checkpoint", ("step", "save", "start"), kill_rank),
    "stop_rank": Fault("the rank is named; requeued from the newest checkpoint", ("step", "save", "step"), stop_rank),
    "node_down": Fault(
        "requeued from the newest checkpoint when the node is back", ("step", "save", "step"), node_down
    ),
    "full_disk": Fault(
        "one line; older checkpoints stay; resumes when there is room", ("step", "save", "save"), full_disk
    ),
    "damaged": Fault("refuses, names an intact one; resumes from that", ("step", "save", "step"), damaged),
    "damaged_fall_back": Fault("warns and goes on from the one before", ("step", "save", "step"), damaged_fall_back),
}
"""Every kind, by name, in the order in which they are played."""
AROUND = {"full_disk": small_disk}
"""What a round of some faults needs around it."""
