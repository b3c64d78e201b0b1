"""The table, the files and the picture of made-up runs."""

import dataclasses
import json
from pathlib import Path

import pytest
from made_up import finish, leave_checkpoint, leave_round, measurement, plan, write_comparison
from PIL import Image

from megavlm.benchmark.job import round_file
from megavlm.benchmark.picture import draw_comparison, smooth
from megavlm.benchmark.results import collect_results, markdown, print_results, write_results
from megavlm.benchmark.speed import write_speed


def test_results_of_made_up_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison, chains = plan(write_comparison(tmp_path))
    for chain, score in zip(chains, (0.5, 0.25, 0.75, 0.5), strict=True):
        finish(chain, score)
    leave_round(comparison, chains, 1, [10.0, 5.0])
    leave_round(comparison, chains, 2, [2.0, 3.0])  # a round on a busy machine: slow for both
    results = collect_results(comparison, chains)
    assert results.ratios("none") == [0.5, 1.5]

    titles, *cells = results.table()
    rows = [dict(zip(titles, row, strict=True)) for row in cells]
    assert rows[0]["variant"] == "tags"
    assert rows[0]["exact match"] == "62.5% (50.0, 75.0)"
    assert rows[0]["ratio"] == "1"
    assert rows[1]["exact match"] == "37.5% (25.0, 50.0)"
    assert rows[1]["blank images"] == "12.5%"
    assert rows[1]["samples/s"] == "4.00"
    assert rows[1]["ratio"] == "1.00 (0.50-1.50)"  # of the medians it would be 0.67
    assert rows[1]["tokens/s"] == "400"
    assert rows[1]["GFLOP a sample"] == "2.500"
    assert rows[1]["peak MiB"] == "600"
    assert rows[1]["validation loss"] == "0.3750"  # of 0.25 and 0.5
    assert rows[1]["TFLOP a run"] == "0.24"  # 2.5 GFLOP, 16 samples a step, 6 steps
    assert "dispatch" not in rows[1], "no variant has experts"

    write_results(tmp_path, results)
    content = json.loads((tmp_path / "results.json").read_text())
    assert [(run["variant"], run["seed"]) for run in content["runs"]] == [
        (chain.variant, chain.seed) for chain in chains
    ]
    last = content["runs"][3]
    assert (last["exact_match"], last["blank_images"], last["most_frequent_answer"]) == (0.5, 0.125, 0.25)
    assert (last["validation_loss"], last["by_num_tiles"]["3"]) == (0.5, [1.0, 6])
    assert content["speed"]["none"]["ratio"] == [0.5, 1.5]
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "seed 1, 2" in lines[-1]
    assert "2 round(s) of 3 steps on 1 rank(s)" in lines[-1]
    print_results(results)
    assert "samples/s" in capsys.readouterr().out

    draw_comparison(tmp_path / "compare.png", chains, results)
    assert Image.open(tmp_path / "compare.png").width > 1000


def test_variants_of_unequal_cost_are_drawn_by_operations_too(tmp_path: Path) -> None:
    longer = write_comparison(tmp_path, variants={"short": [], "long": ["training.train_iters=9"]}, seeds=[1])
    comparison, chains = plan(longer)
    for chain in chains:
        finish(chain, 0.5)
    leave_round(comparison, chains, 1, [10.0, 10.0])
    draw_comparison(tmp_path / "one_round.png", chains, collect_results(comparison, chains))  # the second is missing
    leave_round(comparison, chains, 2, [10.0, 10.0])
    results = collect_results(comparison, chains)
    assert results.flops_of_run("long") == 1.5 * (results.flops_of_run("short") or 0.0) > 0
    draw_comparison(tmp_path / "unequal.png", chains, results)
    comparison, chains = plan(write_comparison(tmp_path, seeds=[1], save=str(tmp_path / "equal")))
    for chain in chains:
        finish(chain, 0.5)
    for number in (1, 2):
        leave_round(comparison, chains, number, [10.0, 10.0])
    draw_comparison(tmp_path / "equal.png", chains, collect_results(comparison, chains))
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("unequal", "equal")]
    assert widths[0] > 1.4 * widths[1], "a panel more"


def test_dispatch_is_a_column_where_a_variant_has_experts(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path, seeds=[1], speed={"rounds": 1, "steps": 3}))
    shares = {"router": 0.1, "permute": 0.2, "exchange": 0.05, "experts": 0.3, "unpermute": 0.1}
    for chain in chains:
        speed = measurement(chain, 5.0)
        if chain.variant == "none":
            speed = dataclasses.replace(speed, expert_shares=shares)
        write_speed(speed, round_file(comparison, 1, chain.variant))
    results = collect_results(comparison, chains)
    titles, *rows = results.table()
    assert [row[titles.index("dispatch")] for row in rows] == ["", "35.0%"]
    assert "on their way to their experts" in markdown(results)


def test_only_finished_runs_and_complete_rounds_count(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path))
    finish(chains[1], 0.25)
    leave_checkpoint(chains[0], 0, 6)
    leave_checkpoint(chains[0], 1, 4)
    results = collect_results(comparison, chains)
    assert [(run.variant, run.seed) for run in results.runs] == [("none", 1)]
    assert results.rounds == []
    assert results.table() == [
        ["variant", "exact match", "blank images", "validation loss"],
        ["tags", "", "", ""],
        ["none", "25.0%", "12.5%", "0.2500"],
    ]
    draw_comparison(tmp_path / "compare.png", chains, results)
    assert (tmp_path / "compare.png").exists()


def test_nothing_is_finished_yet(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path))
    results = collect_results(comparison, chains)
    assert "Nothing is finished yet." in markdown(results)
    draw_comparison(tmp_path / "compare.png", chains, results)
    assert not (tmp_path / "compare.png").exists()


def test_smoothing_keeps_a_short_curve_and_levels_a_long_one() -> None:
    assert smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    zigzag = [float(step % 2) for step in range(400)]
    assert all(0.4 < value < 0.6 for value in smooth(zigzag)[20:])


def test_scores_are_columns_and_panels(tmp_path: Path) -> None:
    scores = {"text": {"kind": "jsonl", "path": "words.jsonl"}}
    comparison, chains = plan(write_comparison(tmp_path, scores=scores, speed=None))
    for chain, text in zip(chains, (1.0, 0.25, 0.5, 0.75), strict=True):
        finish(chain, 0.5, text=text)
    results = collect_results(comparison, chains)
    titles, *rows = results.table()
    assert titles == ["variant", "exact match", "text", "blank images", "validation loss"]
    assert [row[2] for row in rows] == ["75.0% (100.0, 50.0)", "50.0% (25.0, 75.0)"]
    assert "Exact match on 8 questions, and on text: mean" in markdown(results)
    draw_comparison(tmp_path / "with.png", chains, results)
    draw_comparison(tmp_path / "without.png", chains, dataclasses.replace(results, scores=[]))
    widths = [Image.open(tmp_path / f"{name}.png").width for name in ("with", "without")]
    assert widths[0] > widths[1] + 300
