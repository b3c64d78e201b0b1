"""A blend of packed samples through ``megavlm train``: shares in the log, and a stopped run that goes on exactly."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import losses

Run = Callable[..., subprocess.CompletedProcess[str]]


def blend_recipe(recipe: Path, dataset: Path, tmp_path: Path) -> Path:
    """The small recipe with two sources: its own rows, and documents."""
    documents = [{"text": f"number {number} is a number, and {number + 1} is the next."} for number in range(9)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    sources = [
        {"name": "chat", "dataset": {"kind": "jsonl", "path": str(dataset / "train.jsonl")}, "weight": 3},
        {"dataset": {"kind": "jsonl", "path": str(tmp_path / "documents.jsonl")}, "weight": 1},
    ]
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["data"] |= {
        "train": {"kind": "blend", "sources": sources},
        "packing": {"buffer_size": 8},
        "balancing": {"tile_cost_in_tokens": 5},
        "loss_weighting": "square_root",
    }
    content["model"]["language"] |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}  # drawn otherwise by two ranks
    content["training"]["train_iters"] = 6
    content["checkpoint"]["save_interval"] = 3
    content["logging"] = {"log_interval": 2, "tensorboard": False}
    path = tmp_path / "blend.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_packed_blend_is_counted_and_goes_on_under_other_ranks(
    megavlm: Run, recipe: Path, dataset: Path, tmp_path: Path
) -> None:
    path = blend_recipe(recipe, dataset, tmp_path)
    whole = tmp_path / "whole"
    result = megavlm("train", path, f"checkpoint.save={whole}", timeout=250.0)
    assert result.returncode == 0, result.stdout
    assert "33 samples in a blend of chat, documents.jsonl, 0 unusable rows left out" in result.stdout
    assert "shares of the samples: chat 75.00%, documents.jsonl 25.00%" in result.stdout
    lines = re.findall(r"padding: ([0-9.]+)% \| samples per row: ([0-9.]+) \| row fill: ([0-9.]+)% \|", result.stdout)
    assert len(lines) == 3
    assert all(float(samples) > 1.5 for _, samples, _ in lines)
    points = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    shown = [point["sources"] for point in points if "sources" in point]
    assert len(shown) == 3
    for sources in shown:
        assert [source["name"] for source in sources] == ["chat", "documents.jsonl"]
        for share in ("sample_share", "token_share", "trained_token_share"):
            assert abs(sum(source[share] for source in sources) - 1) < 1e-6
        assert all(source["loss"] > 0 for source in sources)

    # the same from its middle, on two ranks and with workers
    extra = json.loads((whole / "iter_0000003/extra.json").read_text())
    assert any(pending for _, pending in extra["data"])  # samples that wait for a row
    cut = tmp_path / "cut"
    shutil.copytree(whole / "iter_0000003", cut / "iter_0000003")
    (cut / "latest_checkpointed_iteration.txt").write_text("3")
    arguments = ("--nproc-per-node", 2, "data.num_workers=2", f"checkpoint.save={cut}")
    resumed = megavlm("train", path, *arguments, timeout=250.0)
    assert resumed.returncode == 0, resumed.stdout
    expected = [loss for step, loss, _ in losses(whole) if step > 3]
    # Measured worst 8e-8: the sum over two ranks.
    assert [loss for _, loss, _ in losses(cut)] == pytest.approx(expected, rel=1e-5)
    last = json.loads((cut / "iter_0000006/extra.json").read_text())
    assert last == json.loads((whole / "iter_0000006/extra.json").read_text())
