"""A run is killed while it saves, at every moment that the file system can see: what was saved before still loads."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_model
import pytest
import torch
from harness import FORKS, run_ranks

from megavlm.checkpoint import RunFolder, load_checkpoint, save_checkpoint, verify
from megavlm.checkpoint.manifest import find_damage
from megavlm.runtime import process

STEP_BEFORE, STEP = 1, 2
CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
NO_MOMENT = 77

_MOST_SECONDS = 60.0


def in_child(function: Callable[..., None], *args: Any) -> int:
    """Run a function in a process that imports nothing again. Returns its exit status, -N if signal N ended it.

    It is forked from a server that has only imported, because other tests leave threads in this process, and what they
    hold stays locked in a fork of it.
    """
    child = FORKS.Process(target=_in_a_run, args=(function, args))
    child.start()
    child.join(_MOST_SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        raise AssertionError(f"{function.__name__} took more than {_MOST_SECONDS:.0f} s")
    return child.exitcode


def _in_a_run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    with process.process():
        function(*args)


def save(run_folder: Path, step: int) -> None:
    """Save step ``step`` of a model whose weights come from the step."""
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST, with_optimizer=False, seed=step)
    save_checkpoint(
        run_folder, step, engine, {"step": step}, {"recipe.yaml": "a: 1"}, with_optimizer=False, keep_last=1
    )


def kill_at(moment: int, run_folder: Path) -> None:
    """From now on, die like ``kill -9`` when something is opened, renamed, made or removed there the moment-th time."""
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES and str(run_folder) in str(args[0]):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_killed_at(moment: int, run_folder: Path) -> None:
    """Save, but die at a moment."""
    kill_at(moment, run_folder)
    save(run_folder, STEP)


def save_with_short_files(num_bytes: int, run_folder: Path) -> None:
    """Save, but be ended by the kernel when a file is longer than ``num_bytes``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    save(run_folder, STEP)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path / "before"
    assert in_child(save, folder, STEP_BEFORE) == 0
    return folder


def check_after(run_folder: Path) -> int:
    """What the next start of the run finds. Returns the step that it goes on from."""
    owner = RunFolder(run_folder)
    owner.clean()
    assert {path.name for path in run_folder.iterdir()} <= {
        "iter_0000001",
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
        "latest_checkpointed_iteration.txt.new",
    }
    newest = owner.newest()
    assert newest in (STEP_BEFORE, STEP)
    for step in owner.checkpoints():  # each is whole, bit by bit
        assert find_damage(owner.checkpoint(step)) is None
    assert owner.read_tracker() in owner.checkpoints() or owner.read_tracker() < newest
    return newest


def test_killed_at_each_moment(before: Path, tmp_path: Path) -> None:
    steps = []
    for moment in range(1, 200):
        run_folder = Path(shutil.copytree(before, tmp_path / str(moment)))

        status = in_child(save_killed_at, moment, run_folder)
        assert status in (0, -signal.SIGKILL)
        steps.append(check_after(run_folder))
        if status == 0:
            break
    assert len(steps) > 20, "the save was not interrupted"
    assert steps == sorted(steps), "once it is there it stays"
    assert {STEP_BEFORE, STEP} == set(steps)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 3_000, 20_000, 60_000])
def test_killed_in_the_middle_of_a_file(before: Path, num_bytes: int) -> None:
    """The kernel ends the process when a file of it reaches a size."""
    assert in_child(save_with_short_files, num_bytes, before) == -signal.SIGXFSZ
    leftovers = [path for path in before.iterdir() if ".writing-" in path.name]
    assert len(leftovers) == 1
    assert check_after(before) == STEP_BEFORE


def load_newest(run_folder: Path) -> tuple[int, dict[str, Any], bool]:
    """Returns the step, what was saved with it, and whether the weights are those that step was saved with."""
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST, with_optimizer=False, seed=99)
    loaded = load_checkpoint(run_folder, engine, with_optimizer=False)
    weights = [parameter.clone() for parameter in engine.chunks[0].parameters()]
    checkpoint_model.leave()
    expected = checkpoint_model.build(language=checkpoint_model.SMALLEST, with_optimizer=False, seed=loaded.iteration)
    is_same = all(map(torch.equal, weights, expected.chunks[0].parameters()))
    return loaded.iteration, loaded.extra, is_same


def test_the_next_run_loads_and_saves_again(before: Path) -> None:
    assert in_child(save_killed_at, 15, before) == -signal.SIGKILL
    assert check_after(before) == STEP_BEFORE
    assert run_ranks(load_newest, 1, before)[0] == (STEP_BEFORE, {"step": STEP_BEFORE}, True)
    run_ranks(save, 1, before, STEP)
    assert run_ranks(load_newest, 1, before)[0] == (STEP, {"step": STEP}, True)
    assert sorted(path.name for path in before.iterdir()) == ["iter_0000002", "latest_checkpointed_iteration.txt"]


def test_a_load_does_not_disturb_a_save_that_goes_on(before: Path) -> None:
    """Evaluation reads the run folder of a run that is alive."""
    writing = RunFolder(before).start_writing(STEP)
    assert run_ranks(load_newest, 1, before)[0][0] == STEP_BEFORE
    assert writing.exists()
    verify(before / "iter_0000001")
