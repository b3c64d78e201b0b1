"""``megavlm train`` and ``megavlm eval`` as a person runs them: what a run leaves, resuming, killing."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import command, command_environment, losses
from PIL import Image

from megavlm.config import load_recipe
from megavlm.recipe import Recipe

Run = Callable[..., subprocess.CompletedProcess[str]]

TWO_RANKS = ("--nproc-per-node", 2)


def test_a_run_leaves_what_it_promises(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    result = megavlm("train", recipe, *TWO_RANKS, "logging.tensorboard=true", "training.eval_interval=6")
    assert result.returncode == 0, result.stdout
    run = tmp_path / "run"
    assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == "12"
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000008", "iter_0000012"]  # keep_last is 2
    assert load_recipe(run / "recipe.yaml", [], Recipe) == load_recipe(run / "iter_0000012/recipe.yaml", [], Recipe)
    assert list((run / "tensorboard").glob("events.out.tfevents*"))
    assert Image.open(run / "loss.png").size[0] > 500
    assert [step for step, _, _ in losses(run)] == list(range(1, 13))
    assert "iteration       12/      12 | consumed samples:           96 |" in result.stdout
    assert "validation loss at iteration 6 | lm loss value:" in result.stdout
    assert "Warning" not in result.stdout, result.stdout

    evaluated = megavlm("eval", run, *TWO_RANKS, "--max-new-tokens", 4)
    assert evaluated.returncode == 0, evaluated.stdout
    answers = json.loads((run / "evaluation.json").read_text())
    assert answers["score"]["num_questions"] == len(answers["answers"]) == 5
    assert (run / "samples.png").exists()
    layouts: list[tuple[object, ...]] = [
        ("--nproc-per-node", 1),
        (*TWO_RANKS, "engine.tensor_model_parallel_size=2", "engine.sequence_parallel=true"),
        (*TWO_RANKS, "engine.pipeline_model_parallel_size=2"),
    ]
    for layout in layouts:
        again = megavlm("eval", run, *layout, "--max-new-tokens", 4)
        assert again.returncode == 0, again.stdout
        assert json.loads((run / "evaluation.json").read_text())["answers"] == answers["answers"]


@pytest.fixture(scope="module")
def whole_curve() -> dict[str, list[tuple[int, float, float]]]:
    """Curve of the run that nothing interrupted, once found."""
    return {}


@pytest.fixture
def reference(
    megavlm: Run, recipe: Path, tmp_path: Path, whole_curve: dict[str, list[tuple[int, float, float]]]
) -> list[tuple[int, float, float]]:
    if not whole_curve:
        result = megavlm("train", recipe, *TWO_RANKS)
        assert result.returncode == 0, result.stdout
        whole_curve["dp2"] = losses(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    return whole_curve["dp2"]


def start(recipe: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """Start the run in a process group of its own."""
    return subprocess.Popen(
        command("train", recipe, *TWO_RANKS),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=command_environment(),
        cwd=tmp_path,
        start_new_session=True,
        text=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.002)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of all ranks and their launcher."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.timeout(240)
def test_killed_in_a_step_and_in_a_save_the_curve_is_the_same(
    megavlm: Run, recipe: Path, tmp_path: Path, reference: list[tuple[int, float, float]]
) -> None:
    run = tmp_path / "run"
    process = start(recipe, tmp_path)
    wait_until(lambda: steps_done(run) >= 6, process)  # between two checkpoints
    kill(process)
    assert steps_done(run) < 12
    process = start(recipe, tmp_path)
    wait_until(lambda: any(path.name.startswith("iter_0000008.writing") for path in run.iterdir()), process)
    time.sleep(random.uniform(0.0, 0.2))
    kill(process)
    result = megavlm("train", recipe, *TWO_RANKS)
    assert result.returncode == 0, result.stdout
    assert "resuming" in result.stdout
    assert losses(run) == reference
    assert not [path.name for path in run.iterdir() if ".writing" in path.name]


@pytest.mark.timeout(180)
def test_asked_to_stop_it_saves_and_the_curve_is_the_same(
    megavlm: Run, recipe: Path, tmp_path: Path, reference: list[tuple[int, float, float]]
) -> None:
    run = tmp_path / "run"
    process = start(recipe, tmp_path)
    wait_until(lambda: steps_done(run) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    assert 2 <= steps_done(run) < 12
    assert (run / "latest_checkpointed_iteration.txt").read_text().strip() == str(steps_done(run))
    result = megavlm("train", recipe, *TWO_RANKS)
    assert result.returncode == 0, result.stdout
    assert losses(run) == reference


@pytest.mark.timeout(180)
def test_time_is_up_and_resumed_under_another_layout(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    no_dropout = ("model.language.attention_dropout=0", "model.language.hidden_dropout=0")
    whole = megavlm("train", recipe, *no_dropout, f"checkpoint.save={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stdout
    first = megavlm("train", recipe, *no_dropout, *TWO_RANKS, "training.exit_duration_in_mins=0.0001")
    assert first.returncode == 0, first.stdout
    assert "time is up" in first.stdout
    layout = ("engine.tensor_model_parallel_size=2", "engine.sequence_parallel=true")
    second = megavlm("train", recipe, *no_dropout, *TWO_RANKS, *layout)
    assert second.returncode == 0, second.stdout
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert [step for step, _, _ in got] == [step for step, _, _ in expected]
    # float32 sums in another order over 12 steps; a loss of another step differs in the second digit
    assert [loss for _, loss, _ in got] == pytest.approx([loss for _, loss, _ in expected], rel=1e-4)


@pytest.mark.timeout(180)
def test_second_stage_starts_from_the_first_and_trains_only_its_parts(
    megavlm: Run, recipe: Path, tmp_path: Path
) -> None:
    first = megavlm("train", recipe, "training.train_iters=2", "training.optimizer.lr_warmup_iters=1")
    assert first.returncode == 0, first.stdout
    stage2 = (
        "training.trainable=[connector]",
        f"checkpoint.save={tmp_path / 'stage2'}",
        f"checkpoint.pretrained_checkpoint={tmp_path / 'run'}",
        "checkpoint.async_save=true",
    )
    second = megavlm("train", recipe, *stage2)
    assert second.returncode == 0, second.stdout
    assert f"starting from the weights of {tmp_path / 'run'}" in second.stdout
    assert "frozen" in second.stdout
    again = megavlm("train", recipe, *stage2)
    assert again.returncode == 0, again.stdout
    assert "all 12 steps are done already" in again.stdout
