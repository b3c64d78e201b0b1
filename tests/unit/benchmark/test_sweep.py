"""The file of a sweep: which rows come out, with which recipes, and what is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up import TINY

from megavlm.benchmark.sweep import PlannedRow, Sweep, load_sweep, plan_rows
from megavlm.recipe import Recipe

EXAMPLES = TINY.parent
TP2 = "engine.tensor_model_parallel_size=2"


def write_sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep of the tiny example; a change to None removes the key."""
    content: dict[str, Any] = {
        "recipe": str(TINY),
        "layouts": {"dp": [], "tp2": [TP2]},
        "ranks_per_node": [1, 2],
        "steps": 3,
        "save": str(folder / "rows"),
    }
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def rows_of(folder: Path, *overrides: str, **changes: Any) -> list[PlannedRow]:
    sweep, for_rows = load_sweep(write_sweep_file(folder, **changes), overrides)
    return plan_rows(sweep, for_rows, 1)


def batches(rows: list[PlannedRow]) -> list[int]:
    return [row.recipe.training.global_batch_size for row in rows if row.recipe is not None]


def test_every_combination_is_a_row(tmp_path: Path) -> None:
    grid = {"training.micro_batch_size": [2, 4], "data.tile_tags": ["none"]}
    rows = rows_of(tmp_path, "model.language.num_layers=2", grid=grid, nodes=[2, 1])
    assert [row.name for row in rows[:4]] == [
        "dp,micro_batch_size=2,tile_tags=none,1x1",
        "dp,micro_batch_size=2,tile_tags=none,1x2",
        "dp,micro_batch_size=2,tile_tags=none,2x1",
        "dp,micro_batch_size=2,tile_tags=none,2x2",
    ]
    assert len(rows) == len({row.name for row in rows}) == 2 * 2 * 4
    recipes = [row.recipe for row in rows if row.recipe is not None]
    assert {recipe.model.language.num_layers for recipe in recipes} == {2}
    assert {recipe.data.tile_tags for recipe in recipes} == {"none"}
    assert [row.recipe.training.micro_batch_size for row in rows[:8] if row.recipe] == [2] * 4 + [4] * 4
    assert rows[8].layout == "tp2"
    assert rows[9].recipe is not None
    assert rows[9].recipe.engine.tensor_model_parallel_size == 2
    assert rows[8].recipe is None
    assert rows[8].refusal.startswith("world_size=1: is no multiple of")


def test_the_batch_grows_with_the_ranks_or_does_not(tmp_path: Path) -> None:
    layouts: dict[str, Any] = {"layouts": {"dp": []}, "nodes": [1, 2]}
    assert batches(rows_of(tmp_path, **layouts)) == [16, 32, 32, 64]
    assert batches(rows_of(tmp_path, **layouts, scaling="strong")) == [16, 16, 16, 16]
    assert batches(rows_of(tmp_path, **layouts | {"ranks_per_node": [2]})) == [16, 32]


def test_the_command_line_says_the_ranks_where_the_file_does_not(tmp_path: Path) -> None:
    sweep, for_rows = load_sweep(write_sweep_file(tmp_path, ranks_per_node=None), ["nodes=[1, 3]", "save=other"])
    rows = plan_rows(sweep, for_rows, 4)
    assert [(row.nodes, row.ranks_per_node, row.ranks) for row in rows[:2]] == [(1, 4, 4), (3, 4, 12)]
    assert sweep.save == Path("other")


def test_a_batch_that_does_not_grow_to_a_whole_number_is_a_row_with_its_reason(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "training.global_batch_size=5", "training.micro_batch_size=1", ranks_per_node=[2, 3])
    assert "global_batch_size=5: is for 2 ranks, and 3 ranks make no whole number of it" in rows[1].refusal


@pytest.mark.parametrize("file", ["layouts.yaml", "layouts_tiny.yaml", "layouts_cluster.yaml"])
def test_the_examples_are_planned(file: str) -> None:
    sweep, for_rows = load_sweep(EXAMPLES / file, [])
    rows = plan_rows(sweep, for_rows, 1)
    refused = {row.name: row.refusal for row in rows if row.recipe is None}
    assert set(refused) <= {"d_tp2,1x1", "d_pp2,1x1", "d_tp2_pp2,2x1"}, refused
    assert len(rows) >= 10


def test_no_key_could_be_meant_for_both() -> None:
    assert set(Sweep.model_fields) & set(Recipe.model_fields) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": {}}, "layout={}: unknown key. Did you mean 'layouts'"),
        ({"layouts": {}}, "layouts={}: Dictionary should have at least 1 item"),
        ({"layouts": {"a/b": []}}, "layouts='a/b': is also part of a folder's name.*Rename it"),
        ({"nodes": [0]}, "nodes.0=0: Input should be greater than 0"),
        ({"grid": {"training.seed": []}}, "grid.training.seed=.*has no value, so there is no row"),
        ({"scaling": "linear"}, "scaling='linear'"),
        ({"time_limit_minutes": 0}, "time_limit_minutes=0"),
        ({"layouts": {"a": ["checkpoint.save=x"]}}, "layouts.a='checkpoint.save=x': nothing is saved.*Use `save`"),
        ({"grid": {"checkpoint.save": ["x"]}}, "grid.checkpoint.save='checkpoint.save=': nothing is saved"),
        ({"nodes": [1, 1]}, "two rows are called 'dp,1x1'. Rename a layout or drop a value"),
        ({"overrides": ["training.sed=3"]}, "training.sed=3: unknown key. Did you mean 'seed'"),
        ({"recipe": "no.yaml"}, "no.yaml: no such file"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, **changes)


def test_an_override_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'step' is no key of a sweep or a recipe\. Did you mean 'steps'"):
        rows_of(tmp_path, "step=3")
