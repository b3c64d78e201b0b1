"""A disk that fills up while a run writes something else than a checkpoint, and a damaged recipe in a checkpoint."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from command_line import assert_one_error, losses

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_what_does_not_fit_is_one_line_and_the_run_goes_on_later(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("loss.png", "log.txt"):
        (run / name).symlink_to("/dev/full")
    short = ("training.train_iters=4", "checkpoint.save_interval=2")
    result = megavlm("train", recipe, *short)
    assert_one_error(result, f"error: checkpoint.save={run}: no space left on the disk", "bytes are free. Make room")
    assert result.stdout.count("log.txt: lines of the log cannot be written: [Errno 28]") == 1
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4]

    for name in ("loss.png", "log.txt"):
        (run / name).unlink()
    (run / "iter_0000004" / "recipe.yaml").write_text("")  # read before anything else of a checkpoint
    curve = losses(run)
    result = megavlm("train", recipe, *short, "checkpoint.fall_back=true")
    assert result.returncode == 0, result.stdout
    assert "iter_0000004/recipe.yaml: has 0 bytes" in result.stdout
    assert losses(run) == curve
    assert (run / "loss.png").exists()
