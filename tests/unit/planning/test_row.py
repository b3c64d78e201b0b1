"""The full row of a recipe, and what the plan prints of it."""

from pathlib import Path
from typing import Any

import pytest

from megavlm.config import load_recipe
from megavlm.planning.flops import count_flops
from megavlm.planning.row import full_row
from megavlm.planning.table import print_plan
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
NVLM = EXAMPLES / "nvlm"

# 256 tokens a tile, six tiles and a thumbnail, sequence lengths of Table 11
ROWS = {"d": (3200, 0, 7 * 256), "x": (1024, 7 * 256, 0), "h": (1280, 6 * 256, 256)}


@pytest.mark.parametrize("architecture", ROWS)
def test_full_row_of_the_paper(architecture: str) -> None:
    recipe = load_recipe(NVLM / f"nvlm_{architecture}_34b_sft.yaml", [], Recipe)
    row = full_row(recipe)
    length, context_length, num_image_tokens = ROWS[architecture]
    assert row.tokens.shape == (1, length)
    assert row.context_length == context_length
    assert row.tiles.shape == (7, 3, 448, 448)
    assert int(row.loss_mask.sum()) == length - num_image_tokens
    assert int(row.tile_context.sum()) == context_length


@pytest.mark.parametrize(
    ("overrides", "num_tiles"), [(["data.tiling.max_tiles=1"], 1), (["data.tiling.kind=whole"], 1)]
)
def test_a_single_tile_has_no_thumbnail(overrides: list[str], num_tiles: int) -> None:
    row = full_row(load_recipe(NVLM / "nvlm_h_34b_sft.yaml", overrides, Recipe))
    assert row.tiles.shape[0] == num_tiles
    assert row.context_length == 1, "all is among the tokens, and the context is one token of padding"


def test_the_plan_names_parts_sizes_and_what_trains(capsys: Any) -> None:
    print_plan(load_recipe(NVLM / "nvlm_x_72b_pretrain.yaml", [], Recipe))
    printed = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert list(lines) == ["vision", "connector", "cross_attention", "language", "all"]
    assert "72,706,203,648" in lines["language"]
    assert "no" in lines["language"]
    assert "yes" in lines["cross_attention"]
    assert "512 tokens and 256 of context, 1 tiles" in " ".join(printed.split())


def table_rows(printed: str, title: str) -> dict[str, list[str]]:
    """The cells of a printed table, by the first of each row."""
    lines = printed[printed.index(title) :].split("└")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return {row[0]: row[1:] for row in cells}


def test_the_plan_tells_active_parameters_and_memory_of_experts(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    recipe = load_recipe(EXAMPLES / "mm1/mm1_3b_moe.yaml", ["engine.expert_model_parallel_size=16"], Recipe)
    print_plan(recipe, world_size=32)
    printed = capsys.readouterr().out
    rows = table_rows(printed, "Model")
    expert = 3 * 3072 * 8704
    assert rows["of it experts"][:2] == [f"{12 * 64 * expert:,}", f"{12 * 2 * expert:,}"]
    assert rows["of it routers"][:2] == [f"{12 * 64 * 3072:,}"] * 2
    total, active = (int(cell.replace(",", "")) for cell in rows["all"][:2])
    assert total - active == 12 * 62 * expert
    assert float(rows["language"][3]) > float(rows["of it experts"][3]) > 100 * float(rows["of it routers"][3]) > 0
    memory = table_rows(printed, "GiB of a rank")
    assert list(memory) == ["0"]
    assert memory["0"][-1] == f"{12 * 64 * expert / 16 * (2 + 4 + 12 / 2) / 2**30:,.2f}"
    assert "32 ranks: tp 1, pp 1, dp 32; experts: ep 16, etp 1, dp 2." in printed


@pytest.mark.parametrize(
    ("recipe", "part", "gradients"),
    [
        # the weight of the linear layer behind 32 queries
        ("minigpt4/minigpt4_7b_stage1", "connector", 2 * 32 * 768 * 4096),
        ("blip2/blip2_7b_stage2", "vision", 0),  # a norm, behind everything
        # nine tiles; each product of three layers of CLIP twice, for its input and its weight or for its two inputs
        (
            "points/points_9b_pretrain",
            "vision",
            3 * 2 * 9 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024),
        ),
    ],
)
def test_the_plan_counts_what_runs_for_modules_that_train(recipe: str, part: str, gradients: int, capsys: Any) -> None:
    loaded = load_recipe(EXAMPLES / f"{recipe}.yaml", [], Recipe)
    forward = count_flops(loaded.model, full_row(loaded), vocab_size=1000, trainable=[]).forward[part]
    print_plan(loaded)
    cells = table_rows(capsys.readouterr().out, "Model")[part]
    assert cells[1:] == ["in part", f"{forward + gradients:.3e}"]


def test_the_plan_refuses_a_layout_that_does_not_fit() -> None:
    recipe = load_recipe(EXAMPLES / "mm1/mm1_3b_moe.yaml", [], Recipe)
    with pytest.raises(ValueError, match=r"world_size=16: is no multiple of expert_tensor_parallel_size"):
        print_plan(recipe, world_size=16)
