"""Operations of models that train in part."""

import random
from collections.abc import Collection, Iterator

import pytest
from counted_models import KINDS, batch_for
from measured_flops import build, check, freezings
from megatron.core import parallel_state
from small_connectors import SMALL_CONNECTORS

from megavlm.models.config import VLMConfig
from megavlm.models.part import Trainable, part_of
from megavlm.runtime import process

MODULES: dict[str, list[dict[str, list[str]]]] = {
    "connector linear": [{"connector": ["linear_fc1.bias"]}, {"connector": ["linear_fc1.weight"]}],
    "connector mlp": [{"connector": ["linear_fc2"]}, {"connector": ["layernorm"]}, {"connector": ["linear_fc1"]}],
    "connector shared_mlp": [{"connector": ["mlp.linear_fc2"]}, {"connector": ["mlp.linear_fc1.bias"]}],
    "connector average_pooling": [{"connector": ["projection.bias"]}, {"connector": ["projection.weight"]}],
    "connector attention_pooling": [
        {"connector": ["projection"]},
        {"connector": ["queries"]},
        {"connector": ["layernorm"]},
        {"connector": ["attention.value"]},
        {"connector": ["attention.query", "attention.output.bias"]},
    ],
    "connector c_abstractor": [
        {"connector": ["mlp.1-2"]},
        {"connector": ["positions"]},
        {"connector": ["behind_pooling.*.squeeze"]},
        {"connector": ["before_pooling.0.shortcut_norm"]},
    ],
    "connector qformer": [
        {"connector": ["projection"]},  # MiniGPT-4
        {"connector": ["layers.1-2", "projection"]},
        {"connector": ["layers.0"]},
        {"connector": ["queries"]},
        {"connector": ["layers.*.cross_attention"]},
        {"connector": ["layers.2.query_ffn.up"]},
    ],
    "connector visual_abstractor": [
        {"connector": ["end_token"]},
        {"connector": ["layers.1", "projection"]},
        {"connector": ["layers.0.feature_norm"]},
        {"connector": ["layers.*.gate"]},
    ],
    "connector resampler": [
        {"connector": ["layernorm"]},
        {"connector": ["latents"]},
        {"connector": ["layers.*.attention.key_norm"]},
        {"connector": ["layers.0.up"]},
    ],
    "vision internvit": [
        {"vision": ["encoder.layers.1"]},
        {"vision": ["encoder.layers.0"]},
        {"vision": ["encoder.layers.*.self_attention.k_layernorm"]},
        {"vision": ["encoder.layers.0.self_attn_bda"]},
        {"vision": ["encoder.layers.1.self_attention.linear_proj.bias"]},
        {"vision": ["encoder.layers.1.self_attention.linear_qkv.bias"], "connector": ["linear_fc2"]},
    ],
    "vision clip": [{"vision": ["pre_layernorm"]}, {"vision": ["encoder.layers.1.pre_mlp_layernorm.bias"]}],
    "vision dinov2": [{"vision": ["encoder.layers.0.mlp_bda"]}, {"vision": ["encoder.layers.0.input_layernorm.bias"]}],
    "vision eva": [{"vision": ["post_layernorm"]}, {"vision": ["embedding.positions"]}],  # the first: BLIP-2
    "vision siglip": [{"vision": ["encoder.layers.1-2.mlp"]}, {"vision": ["embedding.bias"]}],
    "vision dual": [
        {"vision": ["encoders.0.encoder.layers.1"]},  # POINTS
        {"vision": ["encoders.1"], "connector": ["mlp.linear_fc1"]},
    ],
    "D": [
        {"language": ["decoder.layers.1"]},
        {"language": ["decoder.layers.0"]},
        {"language": ["output_layer"], "connector": ["linear_fc2"]},
        {"language": ["decoder.layers.*.mlp.linear_fc2"]},
        {"language": ["decoder.final_layernorm"]},
        {"language": ["embedding"]},
    ],
    "tied": [{"language": ["embedding"]}, {"language": ["decoder.layers.1.self_attention.linear_qkv"]}],
    "X": [
        {"cross_attention": ["decoder.layers.1"]},
        {"cross_attention": ["decoder.layers.0.cross_attention.linear_kv"]},
        {"cross_attention": ["decoder.layers.*.cross_attn_bda"]},
        {"cross_attention": ["decoder.layers.1.pre_cross_attn_layernorm"], "connector": ["linear_fc1"]},
        {"cross_attention": ["weight"]},  # the context's norm
    ],
    "H": [
        {"cross_attention": ["decoder.layers.*.cross_attention.linear_q"], "language": ["embedding"]},
        {"cross_attention": ["decoder.layers.0"], "language": ["decoder.layers.1.input_layernorm"]},
    ],
    "Flamingo": [
        {"cross_attention": ["decoder.layers.0.gated_block.mlp"]},
        {"cross_attention": ["decoder.layers.*.gated_block.mlp_bda"], "language": ["decoder.layers.1"]},
        {"cross_attention": ["decoder.layers.*.gated_block.cross_attention.linear_proj"]},
    ],
    "experts": [
        {"language": ["decoder.layers.1.mlp.router"]},
        {"language": ["decoder.layers.1.mlp.experts"]},
        {"language": ["decoder.layers.*.mlp.experts.local_experts.*.linear_fc2"]},
        {"language": ["decoder.layers.1.pre_mlp_layernorm"]},
        {"language": ["decoder.layers.0.mlp.linear_fc1"]},
    ],
    "LoRA": [
        {"lora": ["decoder.layers.1"]},
        {"lora": ["decoder.layers.*.self_attention.linear_qkv.lora.v_proj.b"]},
        {"lora": ["decoder.layers.0.mlp"], "language": ["decoder.layers.1.mlp.linear_fc2"]},
    ],
    "pairs": [
        {"vision": ["post_layernorm"], "connector": ["layers.2"], "text": ["caption_norm"]},  # BLIP-2, and more
        {"connector": ["layers.2.cross_attention"]},
        {"connector": ["queries"]},
        {"text": ["layers.1.text_ffn"]},
        {"text": ["image_projection"]},
        {"text": ["word_embeddings"]},
    ],
}

NO_PAIRS = ("pairs", "text")


def alone(names: Collection[str]) -> Trainable:
    """These parameters train, and no others."""
    within: dict[str, list[str]] = {}
    for name in names:
        within.setdefault(part_of(name), []).append(name.partition(".")[2])
    return Trainable(frozenset(within), within)


def parameters(config: VLMConfig) -> list[str]:
    return [name for name, _ in build(config, Trainable(frozenset())).named_parameters()]


def looked_at(kind: str, config: VLMConfig) -> list[str]:
    """Parameters of what a model is named after. Experts count as one, so none of them is alone."""
    part = kind.partition(" ")[0]
    if part in ("connector", "vision"):
        return [name for name in parameters(config) if name.startswith(f"{part}.")]
    left_out = () if config.learns_from_pairs else ("vision.", "connector.")
    return [name for name in parameters(config) if not name.startswith(left_out) and ".experts." not in name]


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def test_every_connector_trains_in_part() -> None:
    assert {f"connector {kind}" for kind in SMALL_CONNECTORS} <= MODULES.keys() <= KINDS.keys()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", MODULES)
def test_counts_what_runs_where_modules_train(kind: str) -> None:
    config = VLMConfig.model_validate(KINDS[kind])
    names = parameters(config)
    for number, within in enumerate(MODULES[kind]):
        trained = Trainable(frozenset(within), within)
        assert {part_of(name) for name in names if name in trained} == within.keys(), within
        check(config, batch_for(config, ("images", "text")[number % 2]), trained)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_counts_what_runs_where_drawn_parameters_train(kind: str) -> None:
    config, draw = VLMConfig.model_validate(KINDS[kind]), random.Random(kind)
    names = looked_at(kind, config)
    for number in (1, 2, 3):
        check(config, batch_for(config, "images"), alone(draw.sample(names, min(number, len(names)))))


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    ("kind", "batch"), [(kind, batch) for kind in KINDS for batch in ("one tile", "text") if (kind, batch) != NO_PAIRS]
)
def test_counts_what_runs_where_one_parameter_trains(kind: str, batch: str) -> None:
    config = VLMConfig.model_validate(KINDS[kind])
    for name in looked_at(kind, config):
        check(config, batch_for(config, batch), alone([name]))


@pytest.mark.usefixtures("_one_rank")
def test_counts_what_runs_in_the_first_stage_of_blip2() -> None:
    config = VLMConfig.model_validate(KINDS["pairs"])
    for trainable in freezings("vision", "connector", "text"):
        check(config, batch_for(config, "images"), trainable)
