"""Operations without padding."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import TINY as TINY_RECIPE
from tiny_vlm import FLAMINGO, TINY, VOCAB_SIZE, H, X, make_routed_batch

from megavlm.batch import Batch
from megavlm.benchmark.useful import COUNTED, count_batch
from megavlm.config import load_recipe, validate
from megavlm.models.config import VLMConfig
from megavlm.planning.flops import count_flops
from megavlm.planning.row import full_row
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
MOE = {**TINY, "language": {**TINY["language"], "moe": {"num_moe_experts": 4, "moe_layer_freq": 2}}}
MODELS: dict[str, dict[str, Any]] = {"D": TINY, "X": X, "H": H, "experts": MOE, "Flamingo": FLAMINGO}
ALL = ["vision", "connector", "language"]


def recipe_of(model: dict[str, Any], trainable: list[str], **within: list[str]) -> Recipe:
    tree = load_recipe(TINY_RECIPE, [], Recipe).model_dump(mode="json")
    tree["model"], tree["training"]["trainable"] = model, trainable
    tree["training"]["trainable_within"] = within
    return validate(tree, Recipe, source="test")


def trainable_of(model: dict[str, Any]) -> list[str]:
    return ALL if model["fusion"]["kind"] == "decoder_only" else [*ALL, "cross_attention"]


def batch_of(model: dict[str, Any], rows: list[list[int]], length: int = 24) -> Batch:
    route = VLMConfig.model_validate(model).fusion.tile_route
    return make_routed_batch(rows, 1, route, length=length, pad_multiple=1)


@pytest.mark.parametrize("kind", MODELS)
def test_without_padding_all_of_it_is_useful(kind: str) -> None:
    model = MODELS[kind]
    batch = batch_of(model, [[3], [3]])
    lengths = set(batch.row_lengths.tolist())
    assert lengths == {batch.tokens.shape[1]}
    everything, useful = count_batch(recipe_of(model, trainable_of(model)), batch, VOCAB_SIZE)
    assert useful == everything
    assert set(everything) <= set(COUNTED)
    total = count_flops(
        recipe_of(model, ALL + trainable_of(model)[3:]).model,
        batch,
        vocab_size=VOCAB_SIZE,
        trainable=trainable_of(model),
    )
    assert sum(everything[part] for part in ("vision", "connector", "cross_attention", "language")) == total.total


@pytest.mark.parametrize("trains", ["all", "connector only", "language only"])
@pytest.mark.parametrize("kind", MODELS)
def test_useful_is_what_rows_alone_would_take(kind: str, trains: str) -> None:
    """Each row with tiles in a micro-batch of its own has no padding at all, so there its operations are useful."""
    model = MODELS[kind]
    trainable = {"all": trainable_of(model), "connector only": ["connector"], "language only": ["language"]}[trains]
    if "cross_attention" in trainable_of(model) and trains != "all":
        trainable.append("cross_attention")
    rows = [[3], [2, 3], [5]]
    batch = batch_of(model, rows, length=8)
    assert len(set(batch.row_lengths.tolist())) > 1
    recipe = recipe_of(model, trainable)
    everything, useful = count_batch(recipe, batch, VOCAB_SIZE)
    alone: Counter[str] = Counter()
    for row, length in enumerate(batch.row_lengths.tolist()):
        own = batch.tile_rows == row
        single = dataclasses.replace(
            batch,
            tokens=batch.tokens[row : row + 1, :length],
            loss_mask=batch.loss_mask[row : row + 1, :length],
            tiles=batch.tiles[own],
            tile_context=batch.tile_context[own],
            tile_rows=torch.zeros(int(own.sum()), dtype=torch.int64),
            context_length=int(batch.tile_context[own].sum()),
        )
        flops = count_flops(recipe.model, single, vocab_size=VOCAB_SIZE, trainable=trainable)
        alone += flops.per_part + flops.inside
    assert useful == alone
    assert useful["language"] < everything["language"]
    assert useful["vision"] == everything["vision"]


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_no_use(kind: str) -> None:
    """Texts need no vision encoder and no context; a row that trains nothing is for nothing."""
    model = MODELS[kind]
    recipe = recipe_of(model, trainable_of(model))
    texts = batch_of(model, [[], []])
    everything, useful = count_batch(recipe, texts, VOCAB_SIZE)
    assert everything["vision"] > 0, "a blank tile stands in"
    gone_through = {"cross_attention"} if kind == "Flamingo" else set()  # its gated feed-forward layers
    assert set(useful) - {"experts", "router"} == {"language", *gone_through}
    assert useful["cross_attention"] <= everything["cross_attention"]
    assert useful["language"] == everything["language"]
    texts.loss_mask[0] = 0.0
    _, half = count_batch(recipe, texts, VOCAB_SIZE)
    assert 0 < half["language"] < useful["language"]
    texts.loss_mask[1] = 0.0
    assert count_batch(recipe, texts, VOCAB_SIZE)[1] == Counter()


def test_of_modules_that_train_gradients_are_those_that_run() -> None:
    whole = recipe_of(TINY, ["connector", "language"])
    in_part = recipe_of(TINY, ["connector", "language"], connector=["linear_fc2"], language=["decoder.layers.3"])
    batch = batch_of(TINY, [[3], [3]])
    (everything, useful), (more, _) = (count_batch(recipe, batch, VOCAB_SIZE) for recipe in (in_part, whole))
    assert useful == everything
    num_vectors, shuffled, inner, hidden = 2 * 3 * 4, 4 * 32, 64, 32
    # the first layer has no gradient, the second none of its input
    assert more["connector"] - everything["connector"] == 2 * num_vectors * (2 * shuffled * inner + inner * hidden)
    assert everything["language"] < more["language"]


def test_pairs_are_as_long_as_their_captions() -> None:
    recipe = load_recipe(EXAMPLES / "blip2/tiny_stage1.yaml", [], Recipe)
    row = full_row(recipe)
    length = row.tokens.shape[1]
    lengths = [length, length - 5, length - 8]
    batch = dataclasses.replace(
        row,
        **{name: torch.cat([getattr(row, name)] * 3) for name in ("tokens", "loss_mask", "tiles")},
        row_lengths=torch.tensor(lengths),
    )
    alone: Counter[str] = Counter()
    for number, end in enumerate(lengths):
        batch.loss_mask[number, end:] = 0.0
        single = dataclasses.replace(row, tokens=row.tokens[:, :end], loss_mask=row.loss_mask[:, :end])
        alone += count_batch(recipe, single, VOCAB_SIZE)[0]
    everything, useful = count_batch(recipe, batch, VOCAB_SIZE)
    assert useful == alone
    assert useful["vision"] == everything["vision"]
    assert all(useful[part] < everything[part] for part in ("connector", "text"))
