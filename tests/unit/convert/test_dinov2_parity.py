"""Our DINOv2 against transformers': same weights, same features, same gradients, at any tp and any size of tiles."""

import pytest
import torch
from harness import run_ranks
from parity import encode, largest_difference, randomize, relative_difference
from torch import Tensor
from transformers import Dinov2Config as PublishedConfig
from transformers import Dinov2Model
from transformers.core_model_loading import revert_weight_conversion

from megavlm.convert import dinov2
from megavlm.models.vision.dinov2 import Dinov2Config

PATCH = 14
LAYERS = 3

# name -> (heads, side of the learned grid in patches, side of the tile, other fields, tensor-parallel sizes)
CASES = {
    "6_heads": (6, 4, 4, {}, (1, 2)),
    "3_heads_enlarged": (3, 4, 7, {}, (1, 2)),
    "reduced": (6, 5, 2, {}, (1,)),
    "published_grid": (2, 37, 8, {}, (1,)),
    "swiglu": (3, 4, 4, {"gated_linear_unit": True}, (1, 2)),
    "without_last_norm": (2, 4, 3, {"post_layernorm": False}, (1,)),
    "last_but_one": (2, 4, 4, {"select_layer": -2, "post_layernorm": False}, (1,)),
    "last_but_one_normed": (2, 4, 4, {"select_layer": -2}, (1,)),
    "class_token_and_no_qkv_bias": (2, 4, 5, {"keep_class_token": True, "add_qkv_bias": False}, (1,)),
}


def make(case: str) -> tuple[Dinov2Config, Dinov2Model]:
    heads, grid, side, fields, _ = CASES[case]
    gated = fields.get("gated_linear_unit", False)
    theirs = PublishedConfig(
        image_size=grid * PATCH,
        patch_size=PATCH,
        num_hidden_layers=LAYERS,
        hidden_size=16 * heads,
        mlp_ratio=3,
        num_attention_heads=heads,
        qkv_bias=fields.get("add_qkv_bias", True),
        use_swiglu_ffn=gated,
    )
    ours = Dinov2Config(
        image_size=side * PATCH,
        pretrained_image_size=grid * PATCH,
        patch_size=PATCH,
        num_layers=LAYERS,
        hidden_size=16 * heads,
        ffn_hidden_size=32 * heads if gated else 48 * heads,
        num_attention_heads=heads,
        **fields,
    )
    return ours, Dinov2Model._from_config(theirs, attn_implementation="sdpa")


def features_of(model: Dinov2Model, config: Dinov2Config, tiles: Tensor) -> Tensor:
    output = model(tiles, output_hidden_states=True)
    states = output.hidden_states[config.num_layers_built]
    if config.post_layernorm:
        states = model.layernorm(states)
        if config.select_layer == -1:
            torch.testing.assert_close(states, output.last_hidden_state, rtol=0, atol=0)
    return states[:, 0 if config.keep_class_token else 1 :]


def in_files_names(model: Dinov2Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model in memory as its files name them (and pack them)."""
    return dict(revert_weight_conversion(model, tensors))


# Worst seen: features 1.2e-6, gradient of tiles 4.7e-7, gradients of weights 1.5e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize(("case", "tp"), [(case, tp) for case, entry in CASES.items() for tp in entry[-1]])
def test_dinov2_equals_transformers(case: str, tp: int) -> None:
    ours, theirs = make(case)
    randomize(theirs)
    table = dinov2.weight_map(ours)
    generator = torch.Generator().manual_seed(5)
    tiles = torch.randn(2, 3, ours.image_size, ours.image_size, generator=generator).requires_grad_()
    expected = features_of(theirs, ours, tiles)
    assert expected.shape == (2, ours.num_patches, ours.hidden_size)
    upstream = torch.randn(expected.shape, generator=generator)
    expected.backward(upstream)
    weights = in_files_names(theirs, {name: tensor.detach() for name, tensor in theirs.state_dict().items()})

    answers = run_ranks(encode, tp, tp, ours, table, weights, tiles.detach(), upstream)

    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    expected_gradients = in_files_names(theirs, gradients)
    for features, tile_gradient, weight_gradients in answers:
        found = (
            relative_difference(features, expected.detach()),
            relative_difference(tile_gradient, tiles.grad),
            largest_difference(weight_gradients, expected_gradients),
        )
        print(case, tp, found)
        assert max(found) < TOLERANCE, found
