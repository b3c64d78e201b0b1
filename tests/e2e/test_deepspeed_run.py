"""A run under the DeepSpeed engine, as a person starts it: trained, resumed, evaluated, continued by the other."""

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import assert_one_error, losses

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

Run = Callable[..., subprocess.CompletedProcess[str]]
TWO_RANKS = ("--nproc-per-node", 2)


def test_run_is_trained_evaluated_and_gone_on_with(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    run, zero = tmp_path / "run", ("engine.kind=deepspeed", "engine.zero_stage=3")
    result = megavlm("train", recipe, *TWO_RANKS, *zero, "training.exit_duration_in_mins=0.00001")  # after one step
    assert result.returncode == 0, result.stdout
    assert "stopping after step 1" in result.stdout
    assert "Warning" not in result.stdout, result.stdout
    resumed = megavlm("train", recipe, *TWO_RANKS, *zero)
    assert resumed.returncode == 0, resumed.stdout
    assert [step for step, _, _ in losses(run)] == list(range(1, 13))

    evaluated = megavlm("eval", run, "--max-new-tokens", 4)
    assert evaluated.returncode == 0, evaluated.stdout

    gone_on = megavlm("train", recipe, "engine.kind=megatron", "training.train_iters=14")
    assert gone_on.returncode == 0, gone_on.stdout
    assert "resuming" in gone_on.stdout


def test_stage_0_is_refused_before_the_start(megavlm: Run, recipe: Path) -> None:
    assert_one_error(megavlm("train", recipe, "engine.kind=deepspeed", "engine.zero_stage=0"), "engine.zero_stage=0")


def test_a_place_that_is_no_folder_is_named_at_the_start(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    place = f"engine.nvme_path={tmp_path / 'file'}"
    offload = ("engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload_optimizer=nvme", place)
    assert_one_error(megavlm("train", recipe, *offload), f"{place}: is a file, or lies under one")
