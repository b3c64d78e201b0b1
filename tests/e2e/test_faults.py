"""Ranks that die, stop or hang, and signals to everybody: every other rank says what happened, and nothing is lost."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed
import yaml
from command_line import command, command_environment, losses
from harness import RankError, run_ranks

from megavlm.batch import Batch
from megavlm.config import load_recipe
from megavlm.engines.feed import Feed
from megavlm.recipe import Recipe
from megavlm.runtime.log import start_log
from megavlm.runtime.process import Process
from megavlm.training.loop import train

MANY_STEPS = 100_000
# From the fault to the message. Alone, a machine needs 5 s after a death and 8 s after a stop.
MESSAGE_SECONDS = 60.0

pytestmark = pytest.mark.timeout(240)


class Running:
    """A command that is running, in a process group of its own."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self._output = folder / "output.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command(*arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=command_environment(),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def rank(self, number: int) -> int:
        """Process number of a rank. torchrun gives each a session of its own."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                variables = (path.parent / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid and f"RANK={number}".encode() in variables:
                return int(path.parent.name)
        raise AssertionError(f"rank {number} does not run\n{self.output}")

    def kill(self) -> None:
        """End it; ranks that are left end when they miss the launcher's store."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait for something, whether the command has ended or not; return for how long."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}\n{self.output}"
            time.sleep(0.05)
        return time.monotonic() - started


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts ``megavlm ARGUMENTS``; what still runs at the end is killed."""
    started: list[Running] = []

    def run(*arguments: object) -> Running:
        started.append(Running(tmp_path, *arguments))
        return started[-1]

    yield run
    for running in started:
        running.kill()


@pytest.fixture
def endless(recipe: Path) -> Path:
    """The recipe with more steps than anybody waits for, and nothing saved."""
    content = yaml.safe_load(recipe.read_text())
    content["training"]["train_iters"] = MANY_STEPS
    content["checkpoint"]["save_interval"] = None
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("lm loss") if path.exists() else 0


@pytest.mark.parametrize(
    ("fault", "victim", "words"),
    [
        (signal.SIGKILL, 1, "Rank 1 ({node}) has given no sign of life for"),
        (signal.SIGKILL, 0, "Rank 0 ({node}) has given no sign of life for"),
        (signal.SIGSTOP, 1, "Rank 1 ({node}) has given no sign of life for"),
    ],
)
def test_the_other_rank_names_the_one_that_is_gone(
    start: Callable[..., Running], endless: Path, tmp_path: Path, fault: signal.Signals, victim: int, words: str
) -> None:
    run = tmp_path / "run"
    running = start("train", endless, "--nproc-per-node", 2, "engine.lost_timeout_seconds=6")
    running.wait_until(lambda: steps_done(run) >= 3 or running.process.poll() is not None, 120, "some steps")
    number = running.rank(victim)
    os.kill(number, fault)
    message = words.format(node=os.uname().nodename)
    seconds = running.wait_until(lambda: message in running.output, MESSAGE_SECONDS, "the message")
    print(f"{fault.name} of rank {victim}: named after {seconds:.1f} s")
    if fault == signal.SIGSTOP:
        os.kill(number, signal.SIGKILL)  # torchrun would do it in 30 s
    assert running.process.wait(MESSAGE_SECONDS) != 0
    output = running.output
    last_seen = output.partition(message)[2]
    assert "Last seen at step " in last_seen
    assert "The same command resumes the run from its newest checkpoint." in last_seen
    where = "where its main thread is" if fault == signal.SIGSTOP else "where the collective failed"
    assert ", in _run_steps" in output.partition(f"{where}:\n")[2]
    if victim:
        assert message in (run / "log.txt").read_text()


def test_ranks_end_without_their_launcher(start: Callable[..., Running], endless: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = start("train", endless, "--nproc-per-node", 2)
    running.wait_until(lambda: steps_done(run) >= 3 or running.process.poll() is not None, 120, "some steps")
    ranks = [running.rank(0), running.rank(1)]
    running.kill()
    running.wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), MESSAGE_SECONDS, "the end")
    assert "The store of the run, which rank 0 or its launcher keeps, is gone" in (run / "log.txt").read_text()


def train_hanging(recipe_file: str) -> None:
    """Train; rank 1 never gets its data of step 5."""
    recipe = load_recipe(recipe_file, ["engine.hang_timeout_seconds=3"], Recipe)
    rank = torch.distributed.get_rank()
    read, num_steps = Feed.__next__, 0

    def __next__(self: Feed) -> Sequence[Batch]:  # noqa: N807
        nonlocal num_steps
        num_steps += 1
        if rank == 1 and num_steps == 5:
            time.sleep(1000)
        return read(self)

    Feed.__next__ = __next__  # type: ignore[method-assign,assignment]
    start_log(rank, recipe.checkpoint.save / "log.txt")
    train(recipe, Process(rank, 2, 0, torch.device("cpu"), "gloo"))


def test_a_rank_that_hangs_is_named_by_all(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"died with exit code 75") as failed:
        run_ranks(train_hanging, 2, str(recipe))
    log = (tmp_path / "run" / "log.txt").read_text()
    node = os.uname().nodename
    assert f"Rank 1 ({node}) hangs at step 5, reading data. The others wait for it." in log
    assert "Rank 0: step 5, comparing the step with the other ranks, for" in log
    assert log.count("the run cannot go on.") == 2, "both ranks say it"
    assert "where its main thread is:" in str(failed.value)


@pytest.mark.parametrize("when", ["between", "in a save"])
def test_a_signal_to_everybody_is_survived_with_workers_and_writers(
    start: Callable[..., Running],
    megavlm: Callable[..., subprocess.CompletedProcess[str]],
    recipe: Path,
    tmp_path: Path,
    when: str,
    known_curve: list[list[tuple[int, float, float]]],
) -> None:
    """SIGTERM to the process group, as pre-emption sends it; checkpoints are written beside training."""
    if not known_curve:
        done = megavlm("train", recipe, f"checkpoint.save={tmp_path / 'whole'}")
        assert done.returncode == 0, done.stdout
        known_curve.append(losses(tmp_path / "whole"))
    run = tmp_path / "run"
    arguments = ("train", recipe, "data.num_workers=2", "checkpoint.async_save=true", "checkpoint.save_interval=2")
    running = start(*arguments)
    writing = "iter_0000004.writing"

    def has_come() -> bool:
        is_due = steps_done(run) >= 3 if when == "between" else any(run.glob(f"{writing}*"))
        return is_due or running.process.poll() is not None

    running.wait_until(has_come, 120, "some steps")
    os.killpg(running.process.pid, signal.SIGTERM)
    assert running.process.wait(90) == 0, running.output
    saved = steps_done(run)
    assert 3 <= saved < 12, running.output
    assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == str(saved)
    assert not list(run.glob("*.writing*"))
    done = megavlm(*arguments, "checkpoint.save_interval=20", timeout=180)
    assert done.returncode == 0, done.stdout
    assert losses(run) == known_curve[0]


@pytest.fixture(scope="module")
def known_curve() -> list[list[tuple[int, float, float]]]:
    """The curve that nothing interrupted, once found."""
    return []
