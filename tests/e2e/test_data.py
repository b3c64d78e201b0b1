"""``megavlm data``: from files to shards, a look at them, training on them, and filters that a trained run scores."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import assert_one_error, losses

Megavlm = Callable[..., subprocess.CompletedProcess[str]]


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture
def shards(dataset: Path, tmp_path: Path, megavlm: Megavlm) -> Path:
    said = succeeded(megavlm("data", "prepare", dataset / "train.jsonl", tmp_path / "shards", "--samples-per-shard", 5))
    assert "24 samples with 24 images in 5 shards (format rows, 24 rows of the source)" in said
    return tmp_path / "shards"


def on_shards(recipe: Path, shards: Path, **training: int) -> Path:
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["train"] = {"kind": "shards", "path": str(shards)}
    tree["training"] |= training
    path = recipe.with_name("on_shards.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def test_shards_train_as_their_rows_do(recipe: Path, shards: Path, tmp_path: Path, megavlm: Megavlm) -> None:
    """The same samples in the same order: every loss and gradient norm is equal to the last bit."""
    succeeded(megavlm("train", recipe, "training.train_iters=4"))
    rows = losses(tmp_path / "run")
    path = on_shards(recipe, shards, train_iters=4)
    succeeded(megavlm("train", path, f"checkpoint.save={tmp_path}/run2", "data.num_workers=1"))
    assert losses(tmp_path / "run2") == rows
    said = succeeded(megavlm("data", "show", path, "--num", 3, "--out", "look"))
    assert "{{it is " in said
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == [
        "000.png",
        "001.png",
        "002.png",
        "rows.png",
        "summary.json",
    ]


def test_filters_with_a_trained_run(recipe: Path, dataset: Path, tmp_path: Path, megavlm: Megavlm) -> None:
    """The mean of the perplexities is the validation loss; two ranks score as one does, bit for bit."""
    succeeded(megavlm("train", recipe, "training.train_iters=3", "training.optimizer.lr_warmup_iters=1"))
    points = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    [validation] = [point["lm loss validation"] for point in points if "lm loss validation" in point]
    for name, ranks in (("one", 1), ("two", 2)):
        arguments = ("--model", "run", "--keep", "0.4", "--batch-size", 2, "--nproc-per-node", ranks)
        said = succeeded(megavlm("data", "filter", "perplexity", dataset / "valid.jsonl", name, *arguments))
        assert "2 of 5 samples kept" in said
    one, two = ((tmp_path / name / "scores.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    scores = [json.loads(line) for line in one.splitlines()[1:]]
    total = sum(math.log(entry["score"]) * entry["num_tokens"] for entry in scores)
    # float32 losses in batches of other shapes
    assert total / sum(entry["num_tokens"] for entry in scores) == pytest.approx(validation, rel=2e-5)
    kept = (tmp_path / "one/kept.jsonl").read_text().splitlines()
    lowest = sorted(sorted(scores, key=lambda entry: entry["score"])[:2], key=lambda entry: entry["number"])
    rows = (dataset / "valid.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [json.loads(rows[entry["number"]]) for entry in lowest]

    # the same run as both models of caption fusion
    captions = [{"image": str(dataset / "1_0.png"), "caption": "number one"}, {"text": "no caption"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    models = ("--caption-model", "run", "--language-model", "run", "--max-new-tokens", 5)
    prompt = ("--fusion-prompt", "{raw} or {described}")
    said = succeeded(
        megavlm("data", "filter", "caption-fusion", "captions.jsonl", "out", *models, *prompt, timeout=300)
    )
    assert "images described" in said
    assert "captions fused" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["num_samples"] == 2
    assert report["reasons"]["no_caption"] == 1


def test_a_wrong_command_ends_in_one_line(megavlm: Megavlm) -> None:
    assert_one_error(megavlm("data", "prepare", "gone.jsonl", "out"), "megavlm data prepare: error: source=gone.jsonl")
