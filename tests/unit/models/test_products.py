"""The listed widths are those of the layers that are built."""

from typing import Any

import pydantic
import pytest
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megavlm.engines import MegatronEngineConfig
from megavlm.models.config import VLMConfig
from megavlm.models.connectors import CONNECTORS
from megavlm.models.moe.experts import GroupedExperts
from megavlm.models.products import product_sides
from megavlm.models.vlm import VLM
from megavlm.runtime.fake_world import fake_world

VISION = {
    "kind": "internvit", "image_size": 28, "patch_size": 7, "num_layers": 1, "hidden_size": 48, "ffn_hidden_size": 80,
    "num_attention_heads": 4, "normalization": "RMSNorm", "qk_layernorm": True, "add_qkv_bias": True,
}  # fmt: skip
SIGLIP = {
    "kind": "siglip", "image_size": 28, "patch_size": 7, "num_layers": 1, "hidden_size": 48, "ffn_hidden_size": 80,
    "num_attention_heads": 4,
}  # fmt: skip
LANGUAGE = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 112, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 24,
}  # fmt: skip
MOE = {"num_moe_experts": 2, "moe_layer_freq": [0, 1], "moe_ffn_hidden_size": 176}
MODELS: dict[str, dict[str, Any]] = {
    "D": {"vision": VISION, "connector": {"kind": "mlp", "ffn_hidden_size": 144}, "fusion": {"kind": "decoder_only"}},
    "X": {"vision": SIGLIP, "connector": {"kind": "mlp", "num_layers": 1}, "fusion": {"kind": "cross_attention"}},
    "Flamingo": {
        "vision": SIGLIP, "connector": {"kind": "mlp", "num_layers": 1},
        "fusion": {"kind": "cross_attention", "feed_forward": {"ffn_hidden_size": 208}},
    },
    "experts": {
        "vision": SIGLIP, "connector": {"kind": "mlp"}, "fusion": {"kind": "decoder_only"},
        "language": {**LANGUAGE, "moe": MOE},
    },
}  # fmt: skip


def part_of_module(name: str) -> str:
    words = name.split(".")
    if "gated_block" in words:
        return "cross_attention"
    return next((part for part in ("vision", "connector", "cross_attention", "experts") if part in words), "language")


def built_widths(config: VLMConfig, tp: int) -> set[tuple[str, int]]:
    """Sides of every weight of a linear layer, as one rank has it."""
    found = set()
    with fake_world(world_size=tp, rank=0):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
        settings = MegatronEngineConfig(tensor_model_parallel_size=tp).megatron_settings()
        model = VLM(config, settings, vocab_size=128, image_token_id=127)
        for name, module in model.named_modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear) and "output_layer" not in name:
                sides = module.weight.shape
            elif isinstance(module, GroupedExperts):
                sides = (*module.linear_fc1_weight.shape[1:], *module.linear_fc2_weight.shape[1:])
            else:
                continue
            found |= {(part_of_module(name), side) for side in sides}
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_side_of_every_linear_layer_is_listed(model: str, tp: int) -> None:
    config = VLMConfig.model_validate({"language": LANGUAGE, **MODELS[model]})
    sides = product_sides(config, tp)
    built = built_widths(config, tp)
    assert {side.part for side in sides} == {part for part, _ in built}
    for part, width in built:
        sizes = {side.size for side in sides if side.part == part and "vectors" not in side.name}
        # layers that stand side by side in one weight (queries, keys and values; gate and value) are listed apart, and
        # a connector's as if each side were the split one
        pairs = {one + other for one in sizes for other in sizes}
        assert width in sizes | pairs | {3 * size for size in sizes} | {tp * size for size in sizes}, (part, width)


def test_vectors_of_a_tile_are_counted_with_the_class_token() -> None:
    def vectors(model: str) -> dict[str, int]:
        sides = product_sides(VLMConfig.model_validate({"language": LANGUAGE, **MODELS[model]}), 1)
        return {side.part: side.size for side in sides if "vectors" in side.name}

    assert vectors("D") == {"vision": 17, "connector": 4}  # 4 x 4 patches and the class token; 2 x 2 shuffled
    assert vectors("X") == {"vision": 16, "connector": 4}


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_kind_of_connector_can_be_asked(kind: str) -> None:
    vision = {**SIGLIP, "image_size": 448, "patch_size": 14}
    tree = {"language": LANGUAGE, **MODELS["X"], "vision": vision, "connector": {"kind": kind}}
    try:
        config = VLMConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        pytest.skip(f"needs more settings: {error.errors()[0]['loc']}")
    assert any(side.part == "connector" for side in product_sides(config, 1))
