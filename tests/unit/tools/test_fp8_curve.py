"""The comparison of FP8 with bfloat16 reads what runs left, trains only what is missing, and judges by its margin."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fp8_curve", TOOLS / "fp8_curve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leave_run(folder: Path, score: float, losses: tuple[list[float], list[float]]) -> None:
    """What ``megavlm train`` and ``megavlm eval`` leave."""
    for number, stage in enumerate(losses, start=1):
        path = folder / f"stage{number}"
        path.mkdir(parents=True)
        points = [{"iteration": step, "lm loss": loss} for step, loss in enumerate(stage, start=1)]
        points.append({"iteration": len(stage), "lm loss validation": stage[-1] / 2})
        (path / "metrics.jsonl").write_text("\n".join(json.dumps(point) for point in points) + "\n")
        (path / "loss.png").touch()
    evaluation = {"score": {"value": score}, "answers": [{}] * 500}
    (folder / "stage2" / "evaluation.json").write_text(json.dumps(evaluation))


def test_a_score_beyond_the_margin_is_a_failure(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "megavlm", lambda *arguments: pytest.fail(f"is there already: {arguments}"))
    leave_run(tmp_path / "bf16", 0.90, ([2.0, 1.0], [1.0, 0.5]))
    leave_run(tmp_path / "mxfp8", 0.86, ([2.0, 1.5], [1.0, 0.6]))
    assert tool.main(["--out", str(tmp_path), "--runs", "mxfp8"]) == 0
    text = capsys.readouterr().out
    assert "| bf16 | 90.0% of 500 | +0.0% | 0.2500 | 0.7500 |" in text
    assert "| mxfp8 | 86.0% of 500 | +4.0% | 0.3000 | 0.8000 |" in text
    tree = json.loads((tmp_path / "fp8_curve.json").read_text())
    assert tree["runs"]["mxfp8"]["losses"] == [[2.0, 1.5], [1.0, 0.6]]
    assert tree["runs"]["mxfp8"]["cpu_seconds"] is None
    assert (tmp_path / "fp8_curve.png").stat().st_size > 10_000
    leave_run(tmp_path / "delayed", 0.84, ([2.0, 1.5], [1.0, 0.6]))
    assert tool.main(["--out", str(tmp_path), "--runs", "mxfp8", "delayed"]) == 1


def test_what_is_missing_is_trained_in_order(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(tool, "megavlm", lambda *arguments: commands.append(arguments))
    tool.train("delayed", tmp_path / "delayed", Path("data"), [3, 4])
    assert [command[0] for command in commands] == ["train", "train", "eval"]
    first, second = (dict(part.split("=", 1) for part in command[2:]) for command in commands[:2])
    for overrides, steps in ((first, "3"), (second, "4")):
        assert overrides["engine.backend"] == "fp8_emulation"
        assert overrides["engine.fp8.recipe"] == "delayed"
        assert overrides["training.train_iters"] == steps
    assert "checkpoint.pretrained_checkpoint" not in first
    assert second["checkpoint.pretrained_checkpoint"] == first["checkpoint.save"]
    assert (second["data.train.path"], second["data.valid.path"]) == ("data/stage2_train.jsonl", "data/valid.jsonl")


def test_mean_of_the_last_steps(tool: ModuleType) -> None:
    losses = list(np.random.default_rng(0).random(120))
    found = tool.smoothed(losses)
    assert found[0] == losses[0]
    assert found[3] == pytest.approx(np.mean(losses[:4]))
    assert found[119] == pytest.approx(np.mean(losses[120 - tool.SMOOTHED_OVER :]))
