"""A run with a spike of the loss in it: told, skipped, or gone back over; and without one nothing is different."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import yaml
from command_line import losses
from harness import run_ranks

from megavlm.config import load_recipe
from megavlm.data import Progress
from megavlm.engines import MegatronEngine
from megavlm.engines.global_loss import Sums
from megavlm.recipe import Recipe
from megavlm.runtime.log import start_log, stop_log
from megavlm.runtime.process import Process
from megavlm.training.loop import train

NUM_STEPS = 10
REWIND = {"factor": 1.5, "min_losses": 3, "window": 8, "action": "rewind", "rewind_after_nans": 2}
Curve = list[tuple[int, float, float]]


def train_here(recipe_file: str, overrides: list[str], bad_loss: int | None, bad_grads: list[int]) -> None:
    """Train on this rank; steps are counted as they are made, those that are undone too.

    Args:
        recipe_file: of the run.
        overrides: of the recipe.
        bad_loss: the step whose loss is 10 times what it was.
        bad_grads: the steps whose gradients are not finite.
    """
    recipe = load_recipe(recipe_file, overrides, Recipe)
    run_schedule, grad_norm = MegatronEngine._run_schedule, MegatronEngine._grad_norm
    num_steps = 0

    def _run_schedule(self: MegatronEngine, batches: Any, *, forward_only: bool) -> Sums:
        nonlocal num_steps
        num_steps += not forward_only
        sums = run_schedule(self, batches, forward_only=forward_only)
        is_bad = num_steps == bad_loss and not forward_only
        return dataclasses.replace(sums, loss=10.0 * sums.loss) if is_bad else sums

    def _grad_norm(self: MegatronEngine) -> float:
        return float("nan") if num_steps in bad_grads else grad_norm(self)

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    MegatronEngine._run_schedule, MegatronEngine._grad_norm = _run_schedule, _grad_norm  # type: ignore[method-assign]
    start_log(rank, recipe.checkpoint.save / "log.txt")
    try:
        train(recipe, Process(rank, world_size, 0, torch.device("cpu"), "gloo"))
    finally:
        MegatronEngine._run_schedule, MegatronEngine._grad_norm = run_schedule, grad_norm  # type: ignore[method-assign]
        stop_log()


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains the recipe for some steps and returns the run folder."""
    content = yaml.safe_load(recipe.read_text())
    content["training"] |= {"train_iters": NUM_STEPS}
    content["checkpoint"] |= {"save_interval": 4, "keep_last": 9}
    content["data"]["valid"] = None
    recipe.write_text(yaml.safe_dump(content))

    def train_run(
        name: str,
        spike: dict[str, Any] | None,
        *overrides: str,
        world_size: int = 1,
        bad_loss: int | None = None,
        bad_grads: list[int] | None = None,
    ) -> Path:
        folder = tmp_path / name
        settings = [f"checkpoint.save={folder}", f"training.loss_spike={json.dumps(spike)}", *overrides]
        run_ranks(train_here, world_size, str(recipe), settings, bad_loss, bad_grads or [])
        return folder

    return train_run


@pytest.fixture(scope="module")
def known() -> dict[str, Curve]:
    return {}


@pytest.fixture
def plain(run: Callable[..., Path], known: dict[str, Curve]) -> Curve:
    """The curve of a run that does not watch for spikes."""
    if not known:
        known["plain"] = losses(run("plain", None))
    return known["plain"]


def points(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [point for point in map(json.loads, lines) if name in point]


@pytest.mark.parametrize("action", ["warn", "skip", "rewind"])
def test_without_a_spike_nothing_is_different(run: Callable[..., Path], plain: Curve, action: str) -> None:
    folder = run("watched", {"action": action, "min_losses": 2})
    assert losses(folder) == plain
    assert "loss spikes:   0 | rewinds:   0 |" in (folder / "log.txt").read_text()
    assert not points(folder, "spike")


@pytest.mark.parametrize("action", ["warn", "skip"])
def test_a_spike_is_told_with_its_samples(run: Callable[..., Path], plain: Curve, action: str) -> None:
    folder = run("spiked", {**REWIND, "action": action}, bad_loss=7)
    curve = losses(folder)
    assert curve[:6] == plain[:6]
    assert curve[6][1] == 10.0 * plain[6][1]
    # what is only told changes nothing after it
    assert (curve[7:] == plain[7:]) == (action == "warn")
    [point] = points(folder, "spike")
    assert point["iteration"] == 7
    assert len(point["spike"]["samples"]) == 8
    assert all("train.jsonl:" in key for key in point["spike"]["samples"])
    log = (folder / "log.txt").read_text()
    assert "loss spike in step 7: " in log
    assert f"its samples: {point['spike']['samples'][0]}, " in log
    assert ("the weights were not updated: loss_spike" in log) == (action == "skip")
    assert "loss spikes:   1 | rewinds:   0 |" in log


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [(1, {"bad_loss": 7}), (2, {"bad_loss": 7}), (1, {"bad_grads": [6, 7]})],
)
@pytest.mark.timeout(180)
def test_gone_back_it_is_a_run_from_the_checkpoint_with_later_data(
    run: Callable[..., Path], tmp_path: Path, world_size: int, settings: dict[str, Any]
) -> None:
    folder = run("rewound", REWIND, world_size=world_size, **settings)
    curve = losses(folder)
    assert [step for step, _, _ in curve] == list(range(1, NUM_STEPS + 1))
    [point] = points(folder, "rewind from")
    assert point["iteration"] == 4
    assert point["rewind from"] == 7
    log = (folder / "log.txt").read_text()
    assert "rewind 1: back after step 4, and on past the 24 samples of the 3 steps since then" in log
    assert "rewinds:   1 |" in log

    # the same from scratch: the checkpoint of step 4, told that 7 steps of data are used
    later = tmp_path / "later"
    later.mkdir()
    shutil.copytree(folder / "iter_0000004", later / "iter_0000004")
    extra = later / "iter_0000004" / "extra.json"
    described = json.loads(extra.read_text())
    assert described["consumed_samples"] == 32
    described |= {"consumed_samples": 56, "data": Progress.after(56).to_json()}
    extra.write_text(json.dumps(described))
    run("later", None, "checkpoint.verify=false", world_size=world_size)
    assert losses(later) == curve[4:]
    saved = json.loads((folder / "iter_0000010" / "extra.json").read_text())
    assert saved["consumed_samples"] == 8 * (NUM_STEPS + 3)
    assert saved["loss_spike"]["num_rewinds"] == 1
    assert os.path.exists(folder / "loss.png")
