"""Counted operations against those that torch's own counter sees in real forward and backward passes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counted_models import BATCHES, EXPERTS, FEED_FORWARDS, FUSIONS, LORAS, MODELS, make_batch
from measured_flops import CROSSED, DENSE, build, check
from megatron.core import parallel_state
from tiny_vlm import TINY, VOCAB_SIZE

from megavlm.batch import TileRoute
from megavlm.config import load_recipe
from megavlm.models import fusion
from megavlm.models.config import VLMConfig
from megavlm.models.part import PARTS, Trainable
from megavlm.planning.experts import count_experts
from megavlm.planning.flops import count_flops
from megavlm.planning.parameters import count_recipe_parameters
from megavlm.planning.scope import Flops
from megavlm.recipe import Recipe
from megavlm.runtime import process

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("batch", ["text", "images"])
@pytest.mark.parametrize("model", MODELS)
def test_counts_what_runs_in_every_model(model: str, batch: str) -> None:
    config = VLMConfig.model_validate(MODELS[model])
    for trainable in DENSE:
        check(config, BATCHES[batch](TileRoute()), trainable)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("batch", ["text", "images"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_counts_what_runs_in_experts(experts: str, batch: str) -> None:
    config = VLMConfig.model_validate({**TINY, "language": {**TINY["language"], "moe": EXPERTS[experts]}})
    for trainable in DENSE:
        check(config, BATCHES[batch](TileRoute()), trainable)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("lora", LORAS)
def test_counts_what_runs_in_lora(lora: str) -> None:
    config = VLMConfig.model_validate({**TINY, "language": {**TINY["language"], "lora": LORAS[lora]}})
    for trainable in [["lora"], ["lora", "connector"], ["lora", "language"], ["connector"], ["language"]]:
        check(config, BATCHES["images"](TileRoute()), trainable)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("experts", EXPERTS)
def test_counts_the_parameters_of_experts(experts: str) -> None:
    config = VLMConfig.model_validate({**TINY, "language": {**TINY["language"], "moe": EXPERTS[experts]}})
    counts: Counter[str] = Counter()
    for name, parameter in build(config, Trainable(frozenset(PARTS))).named_parameters():
        counts.update({inside: parameter.numel() for inside in ("experts", "router") if f".mlp.{inside}." in name})
    counted, moe = count_experts(config.language), config.language.moe
    assert moe is not None
    assert (counted.experts, counted.router) == (counts["experts"], counts["router"])
    assert counted.active_experts * moe.num_moe_experts == counts["experts"] * moe.moe_router_topk
    assert counted.idle == counted.experts - counted.active_experts >= 0


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", fusion.FUSIONS)
def test_counts_what_runs_in_every_fusion(kind: str, batch: str) -> None:
    config = VLMConfig.model_validate({**TINY, "fusion": {"kind": kind, **FUSIONS.get(kind, {})}})
    for trainable in CROSSED if config.cross_attention_layers else DENSE:
        check(config, BATCHES[batch](config.fusion.tile_route), trainable)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_counts_what_runs_in_gated_blocks(feed_forward: str, batch: str) -> None:
    block = {"kind": "cross_attention", "every_n_layers": 2, "feed_forward": FEED_FORWARDS[feed_forward]}
    config = VLMConfig.model_validate({**TINY, "fusion": block})
    for trainable in CROSSED:
        if "text" not in trainable:  # which these models lack
            check(config, BATCHES[batch](config.fusion.tile_route), trainable)


def test_published_sizes_by_hand() -> None:
    """NVLM-D 34B: Yi-34B's decoder behind InternViT-6B."""
    recipe = load_recipe(EXAMPLES / "nvlm/nvlm_d_34b_sft.yaml", [], Recipe)

    def count(num_rows: int, row_length: int) -> Flops:
        batch = make_batch([[7], *[[]] * (num_rows - 1)], TileRoute(), length=row_length, tile_size=448)
        batch.loss_mask.fill_(1)
        return count_flops(recipe.model, batch, vocab_size=64000, trainable=recipe.training.trainable)

    whole, halves = count(1, 3200).forward, count(2, 1600).forward
    # 60 layers of 56 heads with 128 channels, two products: the quadratic part halves with the length of the rows
    attention = 2 * 2 * 3200**2 * 60 * 56 * 128
    assert whole["language"] - halves["language"] == attention // 2
    per_token = (whole["language"] - attention) // 3200
    # query, key and value; output; gate, value and output of the feed-forward layer; vocabulary
    layer = 7168 * (56 + 8 + 8) * 128 + 7168 * 7168 + 3 * 7168 * 20480
    assert per_token == 2 * (60 * layer + 7168 * 64000) == 67_858_595_840
    norms = (2 * 60 + 1) * 7168
    assert per_token == 2 * (count_recipe_parameters(recipe)["language"] - 7168 * 64000 - norms)

    # Each of 7 tiles: 1024 patches and a class token through 45 layers; 256 tokens of four patches to the MLP.
    vision = 1024 * 3 * 14 * 14 * 3200 + 45 * 1025 * 3200 * (3 * 3200 + 3200 + 2 * 12800) + 45 * 2 * 1025**2 * 3200
    assert whole["vision"] == 7 * 2 * vision
    assert whole["connector"] == 7 * 2 * 256 * (12800 * 20480 + 20480 * 7168)
    # vision is frozen; every other product has two gradients (the connector's first feeds its norm)
    assert count(1, 3200).backward == {part: 2 * whole[part] for part in ("connector", "language")}


def test_micro_batches_add_up() -> None:
    config = VLMConfig.model_validate(TINY)
    first, second = (
        count_flops(config, BATCHES[name](TileRoute()), vocab_size=VOCAB_SIZE, trainable=["connector"])
        for name in ("text", "images")
    )
    assert (first + second).total == first.total + second.total
    assert (first + second).per_part["language"] == first.per_part["language"] + second.per_part["language"]


def test_tokenizer_that_does_not_fit_is_named() -> None:
    config = VLMConfig.model_validate(MODELS["tied embeddings, wide heads, padded vocabulary"])
    with pytest.raises(ValueError, match=r"model\.language\.vocab_size=150: the tokenizer has 151 tokens"):
        count_flops(config, BATCHES["text"](TileRoute()), vocab_size=151, trainable=PARTS)


@pytest.mark.parametrize(
    ("model", "route", "trainable", "message"),
    [
        ({}, TileRoute(), ["visoin"], r"trainable=\['visoin'\]: has no part 'visoin'\. Choose from vision, connector"),
        ({}, TileRoute("all"), PARTS, r"batch\.context_length=28: the model has 0 layers with cross-attention"),
        ({"fusion": {"kind": "hybrid"}}, TileRoute(), PARTS, r"batch\.context_length=0: the model has 4 layers"),
    ],
)
def test_what_does_not_fit_together_is_named(
    model: dict[str, Any], route: TileRoute, trainable: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        count_flops(
            VLMConfig.model_validate({**TINY, **model}),
            BATCHES["images"](route),
            vocab_size=VOCAB_SIZE,
            trainable=trainable,
        )
