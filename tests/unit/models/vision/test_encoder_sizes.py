"""Published encoders at their real size, built without memory on the meta device."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megavlm.models.backend import BACKENDS
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.transformer import VisionTransformer
from megavlm.runtime.fake_world import fake_world

SETTINGS: dict[str, Any] = {"params_dtype": torch.bfloat16, "bf16": True, "gradient_accumulation_fusion": False}
INTERNVIT_6B = InternViTConfig(
    image_size=448,
    patch_size=14,
    num_layers=45,
    hidden_size=3200,
    ffn_hidden_size=12800,
    num_attention_heads=25,
    normalization="RMSNorm",
    qk_layernorm=True,
    add_qkv_bias=False,
)
INTERNVIT_300M = InternViTConfig(
    image_size=448,
    patch_size=14,
    num_layers=24,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    normalization="LayerNorm",
    qk_layernorm=False,
    add_qkv_bias=True,
)


def build(config: InternViTConfig, tp: int) -> VisionTransformer:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    settings = {**SETTINGS, "tensor_model_parallel_size": tp, "perform_initialization": False}
    return config.build(settings, BACKENDS["torch"])


# The model cards of InternViT-6B-448px-V1-5 and InternViT-300M-448px say 5540 and 304 million.
@pytest.mark.parametrize(("config", "millions", "digits"), [(INTERNVIT_6B, 5540, -1), (INTERNVIT_300M, 304, 0)])
def test_parameters_are_as_many_as_published(config: InternViTConfig, millions: int, digits: int) -> None:
    with fake_world(world_size=1, rank=0):
        parameters = list(build(config, 1).parameters())
        assert all(parameter.is_meta for parameter in parameters)
        assert round(sum(parameter.numel() for parameter in parameters) / 1e6, digits) == millions
    assert config.num_patches == 1024


@pytest.mark.parametrize(("tp", "num_heads"), [(1, 25), (2, 26), (4, 28), (8, 32)])
def test_25_heads_are_filled_up_to_what_the_ranks_divide(tp: int, num_heads: int) -> None:
    with fake_world(world_size=8, rank=7):
        encoder = build(INTERNVIT_6B.model_copy(update={"num_layers": 1}), tp)
        attention = encoder.encoder.layers[0].self_attention
        assert encoder.config.num_attention_heads == num_heads
        assert attention.linear_qkv.weight.shape == (3 * 128 * num_heads // tp, 3200)
        assert attention.linear_proj.weight.shape == (3200, 128 * num_heads // tp)
        if tp > 1:
            assert attention.linear_qkv.weight.unpadded_shape == (9600, 3200)
            assert attention.linear_proj.weight.unpadded_shape == (3200, 3200)
            assert attention.q_layernorm.weight.unpadded_shape == (3200,)
