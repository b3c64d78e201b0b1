"""Our vision encoders against transformers' classes: same weights, same features, same gradients, at any tp."""

import pytest
import torch
from harness import run_ranks
from parity import encode, largest_difference, randomize, relative_difference
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavlm.convert import clip, internvit, siglip
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig

LAYERS = 3


def _internvit(heads: int, *, like_6b: bool) -> tuple[InternViTConfig, InternVLVisionModel]:
    width = 16 * heads
    ours = InternViTConfig(
        image_size=56,
        patch_size=14,
        num_layers=LAYERS,
        hidden_size=width,
        ffn_hidden_size=160,
        num_attention_heads=heads,
        normalization="RMSNorm" if like_6b else "LayerNorm",
        qk_layernorm=like_6b,
        add_qkv_bias=not like_6b,
    )
    theirs = InternVLVisionConfig(
        image_size=56,
        patch_size=14,
        num_hidden_layers=LAYERS,
        hidden_size=width,
        intermediate_size=160,
        num_attention_heads=heads,
        norm_type="rms_norm" if like_6b else "layer_norm",
        use_qk_norm=like_6b,
        attention_bias=not like_6b,
    )
    return ours, InternVLVisionModel._from_config(theirs, attn_implementation="eager")


def _clip(heads: int, *, activation: str, select_layer: int) -> tuple[ClipConfig, CLIPVisionModel]:
    ours = ClipConfig(
        image_size=56,
        patch_size=14,
        num_layers=LAYERS,
        hidden_size=16 * heads,
        ffn_hidden_size=160,
        num_attention_heads=heads,
        activation=activation,
        select_layer=select_layer,
    )
    theirs = CLIPVisionConfig(
        image_size=56,
        patch_size=14,
        num_hidden_layers=LAYERS,
        hidden_size=16 * heads,
        intermediate_size=160,
        num_attention_heads=heads,
        hidden_act=activation,
    )
    return ours, CLIPVisionModel._from_config(theirs, attn_implementation="sdpa")


def _siglip(heads: int, image_size: int = 56, **fields: bool | int) -> tuple[SiglipConfig, SiglipVisionModel]:
    ours = SiglipConfig(
        image_size=image_size,
        patch_size=14,
        num_layers=LAYERS,
        hidden_size=16 * heads,
        ffn_hidden_size=160,
        num_attention_heads=heads,
        **fields,
    )
    theirs = SiglipVisionConfig(
        image_size=image_size,
        patch_size=14,
        num_hidden_layers=LAYERS,
        hidden_size=16 * heads,
        intermediate_size=160,
        num_attention_heads=heads,
    )
    return ours, SiglipVisionModel._from_config(theirs, attn_implementation="sdpa")


CASES = {
    "internvit_6b_like": (lambda: _internvit(4, like_6b=True), (1, 2)),
    "internvit_300m_like": (lambda: _internvit(4, like_6b=False), (1, 2)),
    "internvit_6b_like_5_heads": (lambda: _internvit(5, like_6b=True), (1, 2, 4)),
    "internvit_300m_like_5_heads": (lambda: _internvit(5, like_6b=False), (4,)),
    "clip_last_but_one": (lambda: _clip(4, activation="quick_gelu", select_layer=-2), (1, 2)),
    "clip_gelu_last_5_heads": (lambda: _clip(5, activation="gelu", select_layer=-1), (1, 4)),
    "siglip_normed_5_heads": (lambda: _siglip(5), (1, 2, 4)),
    "siglip_odd_grid_cut": (lambda: _siglip(4, 47), (1, 2)),
    "siglip_last_but_one_5_heads": (lambda: _siglip(5, 69, select_layer=-2, post_layernorm=False), (1, 4)),
    "siglip_last": (lambda: _siglip(4, post_layernorm=False), (1,)),
}

# Worst seen: features 1.2e-6, gradient of tiles 4e-7, gradients of weights 2e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize(("case", "tp"), [(case, tp) for case, (_, sizes) in CASES.items() for tp in sizes])
def test_encoder_equals_transformers(case: str, tp: int) -> None:
    ours, theirs = CASES[case][0]()
    randomize(theirs)
    table = {"clip": clip, "internvit": internvit, "siglip": siglip}[ours.kind].weight_map(ours)
    generator = torch.Generator().manual_seed(5)
    tiles = torch.randn(2, 3, ours.image_size, ours.image_size, generator=generator).requires_grad_()
    output = theirs(tiles, output_hidden_states=True)
    is_normed = ours.kind == "siglip" and ours.post_layernorm
    expected = output.last_hidden_state if is_normed else output.hidden_states[ours.select_layer]
    expected = expected[:, int(ours.has_class_token) :]
    upstream = torch.randn(expected.shape, generator=generator)
    expected.backward(upstream)
    weights = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}

    answers = run_ranks(encode, tp, tp, ours, table, weights, tiles.detach(), upstream)

    expected_gradients = {
        table.in_table_spelling(name): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    for features, tile_gradient, weight_gradients in answers:
        found = (
            relative_difference(features, expected.detach()),
            relative_difference(tile_gradient, tiles.grad),
            largest_difference(weight_gradients, expected_gradients),
        )
        assert max(found) < TOLERANCE, found
