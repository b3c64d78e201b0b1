"""Counted operations against those that torch's own counter sees in real forward and backward passes."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from small_connectors import SMALL_CONNECTORS, small_model
from tiny_vlm import IMAGE_TOKEN_ID, TINY, VOCAB_SIZE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.batch import Batch, TileRoute
from megavlm.config import load_recipe
from megavlm.engines import MegatronEngineConfig
from megavlm.models import fusion
from megavlm.models.config import VLMConfig
from megavlm.models.cross_attention import CrossAttention
from megavlm.models.initialization import initialize_weights
from megavlm.models.moe import Router
from megavlm.models.moe.health import RouterObserver
from megavlm.models.part import PARTS, part_of
from megavlm.models.vlm import VLM
from megavlm.planning.experts import count_experts
from megavlm.planning.flops import Flops, count_flops
from megavlm.planning.parameters import count_recipe_parameters
from megavlm.recipe import Recipe
from megavlm.runtime import process

EXAMPLES = Path(__file__).parents[3] / "examples"
CLIP: dict[str, Any] = {
    "kind": "clip",
    "image_size": 28,
    "patch_size": 14,
    "num_layers": 3,
    "select_layer": -2,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 3,
}
DINOV2 = {**CLIP, "kind": "dinov2", "gated_linear_unit": True, "pretrained_image_size": 42}
PLAIN_CONNECTOR = {"kind": "mlp", "pixel_shuffle_ratio": 1.0, "bias": True, "layernorm": False}
MODELS: dict[str, dict[str, Any]] = {  # beside TINY: InternViT, a connector of two layers, grouped heads
    "internvit, one layer": {**TINY, "connector": {"kind": "mlp", "num_layers": 1}},
    "dinov2 with SwiGLU": {**TINY, "vision": DINOV2, "connector": PLAIN_CONNECTOR},
    "clip, two layers without a norm": {**TINY, "vision": CLIP, "connector": PLAIN_CONNECTOR},
    "clip, one layer without a norm": {**TINY, "vision": CLIP, "connector": {**PLAIN_CONNECTOR, "num_layers": 1}},
    "tied embeddings, wide heads, padded vocabulary": {
        **TINY,
        "language": {
            **TINY["language"],
            "num_query_groups": None,
            "kv_channels": 12,
            "vocab_size": 150,
            "make_vocab_size_divisible_by": 64,
            "share_embeddings_and_output_weights": True,
        },
    },
}
MODELS |= {f"connector {kind}": small_model(kind, TINY) for kind in SMALL_CONNECTORS}
EXPERTS: dict[str, dict[str, Any]] = {
    "every layer": {"num_moe_experts": 4},
    "every second layer, top 3, narrow experts": {
        "num_moe_experts": 8,
        "moe_layer_freq": 2,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 24,
    },
    "last layer, top 1": {
        "num_moe_experts": 2,
        "moe_layer_freq": [0, 0, 0, 1],
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_z_loss_coeff": 1e-3,
    },
    "experts filled up to their capacity": {
        "num_moe_experts": 4,
        "moe_expert_capacity_factor": 0.7,
        "moe_pad_expert_input_to_capacity": True,
    },
    "more room than tokens": {"num_moe_experts": 4, "moe_expert_capacity_factor": 4.0},
}
FUSIONS: dict[str, dict[str, Any]] = {
    "cross_attention": {"every_n_layers": 2, "first_layer": 1},
    "hybrid": {"every_n_layers": 3, "tag_integration": "concatenate"},
}
DENSE_PARTS = [part for part in PARTS if part != "lora"]
FREEZINGS = [parts for size in range(1, len(DENSE_PARTS) + 1) for parts in itertools.combinations(DENSE_PARTS, size)]
LORAS: dict[str, dict[str, Any]] = {
    "queries and values": {"r": 3},
    "everything": {
        "r": 2,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "last layer": {"r": 5, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [3]},
}
TILE_TOKENS, TAG_TOKENS = 4, 2


def make_batch(rows: Sequence[Sequence[int]], route: TileRoute, *, length: int = 40, tile_size: int = 28) -> Batch:
    """Make a micro-batch that trains two tokens of three; ``rows``: tiles of each image of each row."""
    tiles_per_image = [tiles for images in rows for tiles in images]
    num_tiles = sum(tiles_per_image)
    last = torch.tensor([tile == tiles - 1 for tiles in tiles_per_image for tile in range(tiles)], dtype=torch.bool)
    in_context = {"none": torch.zeros_like(last), "regular": ~last, "all": torch.ones_like(last)}[route.context_tiles]
    tile_rows = torch.tensor([row for row, images in enumerate(rows) for _ in range(sum(images))], dtype=torch.int64)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    visible_tiles = torch.zeros(len(rows), length, 2, dtype=torch.int64)
    for row in range(len(rows)):
        tokens[row, : TILE_TOKENS * int((~in_context[tile_rows == row]).sum())] = IMAGE_TOKEN_ID
        first = int((tile_rows < row).sum())
        visible_tiles[row] = torch.tensor([first, first + int((tile_rows == row).sum())])
    room = TILE_TOKENS + (TAG_TOKENS if route.context_tags == "concatenate" else 0)
    return Batch(
        tokens=tokens,
        labels=torch.ones_like(tokens),
        loss_mask=(torch.arange(tokens.numel()) % 3 > 0).float().view_as(tokens),
        position_ids=torch.arange(length).repeat(len(rows), 1),
        cu_seqlens=torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32),
        tiles=torch.zeros(num_tiles, 3, tile_size, tile_size, dtype=torch.uint8),
        tiles_per_image=torch.tensor(tiles_per_image, dtype=torch.int64),
        visible_tiles=visible_tiles,
        tile_rows=tile_rows,
        tile_context=in_context * room,
        tile_tags=torch.full((num_tiles, TAG_TOKENS), 5),
        context_length=7 * room if route.uses_context else 0,
    )


def packed_batch(route: TileRoute) -> Batch:
    """Rows of two samples each."""
    batch = make_batch([[1, 1], []], route)
    boundaries = torch.tensor([0, 17, 40, 60, 80], dtype=torch.int32)
    return dataclasses.replace(batch, cu_seqlens=boundaries, position_ids=batch.position_ids % 17)


def untrained_batch(route: TileRoute) -> Batch:
    """One image, no trained token."""
    batch = make_batch([[2]], route, length=16)
    return dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))


BATCHES: dict[str, Callable[[TileRoute], Batch]] = {
    "text": lambda route: make_batch([[], []], route, length=24),
    "images": lambda route: make_batch([[1, 4], [2], []], route),
    "one tile": lambda route: make_batch([[], [1]], route),
    "packed": packed_batch,
    "untrained": untrained_batch,
}


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def build(config: VLMConfig, trainable: Collection[str]) -> VLM:
    # torch's counter does not know the grouped product
    settings = MegatronEngineConfig(moe_grouped_gemm=False).megatron_settings()
    model = VLM(config, settings, vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN_ID)
    initialize_weights([model], seed=7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)
    model.language.config.auxiliary_loss_scale_func = lambda: 1.0  # which the engine sets
    return model


class PartCounter:
    """Adds what torch's counter sees to the part whose code runs.

    Backward, a part begins when the gradient of its output arrives: autograd goes through what a forward pass made in
    the reverse order.
    """

    def __init__(self, model: VLM) -> None:
        self.flops = FlopCounterMode(display=False)
        self.unused: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._part = "language"
        self._seen = 0
        for name, module in model.named_modules():
            if name in ("vision", "connector"):
                self._watch(module, name)
            if isinstance(module, CrossAttention):
                self._watch(module, "cross_attention")
            if isinstance(module, ColumnParallelLinear):
                module.register_forward_hook(self._note_unused)
            if isinstance(module, Router):
                module.register_forward_hook(self._note_unused_of_router)

    def take(self) -> Counter[str]:
        """What was counted since the last time, parts that did nothing left out."""
        self._enter("language")
        counts, self._counts = +self._counts, Counter()
        return counts

    def _watch(self, module: torch.nn.Module, part: str) -> None:
        def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._enter(part)
            if part == "cross_attention" and inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: self._enter("language"))

        def after(_: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._enter("language")
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda _: self._enter(part))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _enter(self, part: str) -> None:
        self._counts[self._part] += self.flops.get_total_flops() - self._seen
        self._seen = self.flops.get_total_flops()
        self._part = part

    def _note_unused(self, module: ColumnParallelLinear, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        """A trained layer of megatron-core always computes the gradient of its input; often nothing asks for it."""
        if module.weight is not None and module.weight.requires_grad and not inputs[0].requires_grad:
            self.unused[self._part] += 2 * inputs[0].numel() * module.weight.shape[0]

    def _note_unused_of_router(self, router: Router, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        """megatron-core's router computes both gradients; nothing asks for that of a frozen weight."""
        if inputs[0].requires_grad and not router.weight.requires_grad:
            self.unused["language"] += 2 * inputs[0].numel() * router.num_experts
            self.unused["router"] += 2 * inputs[0].numel() * router.num_experts

    def take_inside(self) -> Counter[str]:
        """All that was counted inside experts and routers."""
        found: Counter[str] = Counter()
        for module, counts in self.flops.get_flop_counts().items():
            words = module.split(".")
            if words[-1] in ("experts", "router") and words[-2] == "mlp":
                found[words[-1]] += sum(counts.values())
        return +found


def forget_forced_gradient(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take back the gradient that ``VLM`` asks for where no trained weight comes before the decoder."""
    hidden_states, *others = inputs
    return (hidden_states.detach() if hidden_states.is_leaf else hidden_states, *others)


def measure(config: VLMConfig, batch: Batch, trainable: Collection[str]) -> tuple[Flops, Counter[str]]:
    """Run the model forward and backward. Return what was computed, and what of the backward pass nothing uses."""
    model = build(config, trainable)
    model.language.register_forward_pre_hook(forget_forced_gradient)
    counter = PartCounter(model)
    # torch's counter does not know the fused attention of the CPU. Its plain one is counted product by product, and
    # leaves out the gradients that nothing asks for.
    with counter.flops, sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        # what the log tells of routers is counted with a small product, which is no part of the model
        patch.setattr(RouterObserver, "groups", lambda *_: None)
        losses = model(batch)
        forward = counter.take()
        if losses.requires_grad:
            losses.sum().backward()
    return Flops(forward, counter.take(), counter.take_inside()), counter.unused


def check(config: VLMConfig, batch: Batch, trainable: Collection[str]) -> None:
    counted = count_flops(config, batch, vocab_size=VOCAB_SIZE, trainable=trainable)
    measured, unused = measure(config, batch, trainable)
    assert counted.forward == measured.forward, trainable
    unused_by_part = Counter({part: unused[part] for part in PARTS})
    assert counted.backward + unused_by_part == measured.backward, trainable
    assert counted.inside + Counter(router=unused["router"]) == measured.inside, trainable
    assert counted.total == sum(counted.per_part.values())


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("batch", ["text", "images"])
@pytest.mark.parametrize("model", MODELS)
def test_counts_what_runs_in_every_model(model: str, batch: str) -> None:
    config = VLMConfig.model_validate(MODELS[model])
    for trainable in FREEZINGS:
        if "cross_attention" not in trainable:  # which these models lack
            check(config, BATCHES[batch](TileRoute()), trainable)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("batch", ["text", "images"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_counts_what_runs_in_experts(experts: str, batch: str) -> None:
    config = VLMConfig.model_validate({**TINY, "language": {**TINY["language"], "moe": EXPERTS[experts]}})
    for trainable in FREEZINGS:
        if "cross_attention" not in trainable:
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
    for name, parameter in build(config, PARTS).named_parameters():
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
    for trainable in FREEZINGS:
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
