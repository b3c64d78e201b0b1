"""``megavlm bench speed`` and ``megavlm bench compare`` as a person runs them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import assert_one_error
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]

TWO_STEPS = ["training.train_iters=2", "training.optimizer.lr_warmup_iters=1"]


def test_speed_counts_all_ranks_and_saves_nothing(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    speeds = {}
    for ranks in (1, 2):
        file = tmp_path / f"speed{ranks}.json"
        options = ("--steps", 3, "--warmup-steps", 1, "--nproc-per-node", ranks, "--json", file)
        result = megavlm("bench", "speed", recipe, *options)
        assert result.returncode == 0, result.stdout
        assert "samples/s" in result.stdout
        speeds[ranks] = json.loads(file.read_text())
    assert not (tmp_path / "run").exists()
    for ranks, speed in speeds.items():
        median = sorted(speed["step_seconds"])[1]
        assert speed["samples_per_second"] == pytest.approx(8 / median)  # the whole global batch, over all ranks
        assert speed["tokens_per_second"] > 10 * speed["samples_per_second"]
        assert speed["tiles_per_second"] > speed["samples_per_second"]
        assert speed["peak_memory_bytes"] > speed["memory_before_model_bytes"] > 50 * 2**20
        assert (speed["num_ranks"], len(speed["step_seconds"])) == (ranks, 3)
    # the ranks share the same micro-batches, so the work of a sample is the same to the last operation
    assert speeds[1]["flops_per_sample"] == speeds[2]["flops_per_sample"] > 1e5


def test_speed_refuses_no_steps(megavlm: Run, recipe: Path) -> None:
    assert_one_error(megavlm("bench", "speed", recipe, "--steps", 0), "bench speed: error: --steps=0", "at least 1")


@pytest.mark.timeout(240)
def test_compare_runs_once_and_refuses_what_differs(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    content = {
        "stages": [recipe.name],
        "overrides": TWO_STEPS,
        "variants": {"tags": [], "none": ["data.tile_tags=none"]},
        "save": "runs/compared",
        "speed": {"rounds": 1, "steps": 1, "warmup_steps": 0},
    }
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    save = tmp_path / "runs/compared"

    first = megavlm("bench", "compare", file, "--quiet", timeout=200)
    assert first.returncode == 0, first.stdout
    assert "run 1 of 6 | tags, seed 1: train recipe" in first.stdout
    assert "run 6 of 6 | none: time recipe, round 1 of 1" in first.stdout
    results = json.loads((save / "results.json").read_text())
    assert [run["variant"] for run in results["runs"]] == ["tags", "none"]
    assert all(run["num_questions"] == 5 and run["validation_loss"] > 0 for run in results["runs"])
    assert results["speed"]["tags"]["ratio"] == [1.0]
    assert (save / "results.md").read_text().startswith("| variant | exact match |")
    assert Image.open(save / "compare.png").width > 1000
    tile_tags = [
        yaml.safe_load((save / name / "seed1/recipe/recipe.yaml").read_text())["data"]["tile_tags"]
        for name in ("tags", "none")
    ]
    assert tile_tags == ["1d", "none"]

    second = megavlm("bench", "compare", file)
    assert second.returncode == 0, second.stdout
    assert "Everything is done already." in second.stdout
    assert "run 1 of" not in second.stdout
    assert json.loads((save / "results.json").read_text()) == results

    refused = megavlm("bench", "compare", file, "training.optimizer.lr=0.5")
    words = ("runs/compared/tags/seed1/recipe was made with", "training.optimizer.lr was 0.003 and is 0.5", "delete")
    assert_one_error(refused, *words)


def test_a_run_that_fails_is_named_and_its_exit_code_kept(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/x/seed1/recipe").mkdir(parents=True)
    (tmp_path / "runs/x/seed1/recipe/metrics.jsonl").mkdir()  # what the run cannot write
    content = {"stages": [recipe.name], "variants": {"x": []}, "save": "runs", "speed": None}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    result = megavlm("bench", "compare", file, "--quiet")
    assert result.returncode == 1, result.stdout
    assert "bench compare: error: x, seed 1: train recipe: failed with exit code 1. The end of" in result.stdout
    assert "IsADirectoryError" in result.stdout


@pytest.mark.timeout(400)
def test_layouts_become_rows_whatever_happens_to_them(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    content = {
        "recipe": recipe.name,
        "layouts": {"tp2": ["engine.tensor_model_parallel_size=2"], "odd": ["training.micro_batch_size=3"]},
        "ranks_per_node": [2],
        "steps": 1,
        "warmup_steps": 1,
        "save": "rows",
    }
    file = tmp_path / "layouts.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    slow = megavlm("bench", "layouts", file, "time_limit_minutes=0.01")
    assert slow.returncode == 0, slow.stdout
    assert "time_limit: was ended after its time limit" in slow.stdout
    assert "odd,1x2: refused: global_batch_size=8" in slow.stdout

    first = megavlm("bench", "layouts", file, "--again", timeout=300)
    assert first.returncode == 0, first.stdout
    rows = {row["name"]: row for row in map(json.loads, (tmp_path / "rows/rows.jsonl").read_text().splitlines())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "tp2,1x2": "ok",
        "odd,1x2": "refused",
    }
    assert "global_batch_size=8: is no multiple of micro_batch_size" in rows["odd,1x2"]["reason"]
    row = rows["tp2,1x2"]
    detail = row["speed"]["detail"]
    parts = detail["breakdown_seconds"]
    assert sum(parts.values()) == pytest.approx(detail["labelled_step_seconds"])
    assert min(parts[label] for label in ("data_wait", "vision", "language", "communication")) > 0
    assert parts["pipeline"] == 0
    assert 0 < detail["mfu"] < detail["mfu_with_padding"]
    assert detail["peak_source"].startswith("measured: best of 5 products")
    whole = sum(detail["flops"][part] for part in ("vision", "connector", "language"))
    assert whole / 8 == pytest.approx(row["speed"]["flops_per_sample"])
    assert 0 < detail["useful_flops"]["language"] < detail["flops"]["language"]
    assert len(detail["peak_memory_bytes"]) == 2
    assert row["planned_bytes"] < row["speed"]["peak_memory_bytes"]
    timed = {(one["group"], one["name"]) for one in detail["collectives"]}
    assert timed == {("tp", "all_reduce"), ("tp", "all_gather"), ("tp", "reduce_scatter"), ("all", "all_reduce")}
    assert Image.open(tmp_path / "rows/rows.png").width > 500
    assert not (tmp_path / "run").exists()
