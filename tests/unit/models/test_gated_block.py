"""Flamingo's gated block against transformers' Idefics, and what it is refused for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from tiny_vlm import FLAMINGO, X
from torch import Tensor
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from megavlm.build import check_run
from megavlm.config import load_recipe
from megavlm.convert.config_of import architecture_of
from megavlm.convert.parts import ModelParts
from megavlm.convert.stock_class import reasons_against
from megavlm.convert.to_hf import _chosen
from megavlm.engines import MegatronEngineConfig
from megavlm.models.backend.torch import TORCH
from megavlm.models.config import VLMConfig
from megavlm.models.fusion.cross_attention import CrossAttentionConfig
from megavlm.models.gated_block import GatedBlockSpec, GatedFeedForwardConfig
from megavlm.recipe import Recipe
from megavlm.runtime import process

RECIPE = Path(__file__).parents[3] / "examples/flamingo/flamingo_3b.yaml"
TOKENS, ROWS, CONTEXT, HEADS, HIDDEN, INNER = 9, 3, 7, 4, 32, 40
RANGES = [[0, 0], [0, 0], [0, 3], [0, 3], [0, 3], [3, 7], [3, 7], [6, 7], [0, 7]]  # of the context, for each token
EPSILON = 1e-5


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


class SquaredReluMLP(torch.nn.Module):
    """Flamingo's feed-forward layer, in the place of Idefics' SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = torch.nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(states)).square())


def idefics_layer(activation: str) -> IdeficsGatedCrossAttentionLayer:
    """Theirs, with weights and gates that are nothing special."""
    config = IdeficsConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        dropout=0.0,
        rms_norm_eps=EPSILON,
        vision_config={"embed_dim": HIDDEN},
        alpha_type="float",
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    layer = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    if activation == "squared_relu":
        layer.mlp = SquaredReluMLP()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def our_block(activation: str, **settings: Any) -> TransformerLayer:
    config = TransformerConfig(
        **{**MegatronEngineConfig().megatron_settings(), **settings},
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=5,  # the decoder's, which is not the block's
        num_attention_heads=HEADS,
        normalization="RMSNorm",
        layernorm_epsilon=EPSILON,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    spec = GatedBlockSpec(
        backend=TORCH,
        gate_init=0.0,
        feed_forward=GatedFeedForwardConfig.model_validate({"ffn_hidden_size": INNER, "activation": activation}),
    )
    return spec.build(config, layer_number=1)


def our_gradients(theirs: IdeficsGatedCrossAttentionLayer, weight: str) -> dict[str, Tensor]:
    """Their weights (or their gradients) under our names."""
    values = {name: getattr(parameter, weight) for name, parameter in theirs.named_parameters()}
    heads = [values[f"cross_attn.{name}_proj.weight"].unflatten(0, (HEADS, 1, -1)) for name in "kv"]
    up = [values[f"mlp.{name}_proj.weight"] for name in ("gate", "up") if f"mlp.{name}_proj.weight" in values]
    return {
        "pre_cross_attn_layernorm.weight": values["input_layernorm.weight"],
        "cross_attention.linear_q.weight": values["cross_attn.q_proj.weight"],
        "cross_attention.linear_kv.weight": torch.cat(heads, dim=1).flatten(0, 2),
        "cross_attention.linear_proj.weight": values["cross_attn.o_proj.weight"],
        "cross_attn_bda.gate": values["alpha_cross_attn"],
        "pre_mlp_layernorm.weight": values["post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat(up),
        "mlp.linear_fc2.weight": values["mlp.down_proj.weight"],
        "mlp_bda.gate": values["alpha_dense"],
    }


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, context, and the gradient of the result: ``[S, N, H]``, ``[C, N, H]``, ``[S, N, H]``."""
    generator = torch.Generator().manual_seed(1)
    lengths = (TOKENS, CONTEXT, TOKENS)
    states, context, gradient = (torch.randn(length, ROWS, HIDDEN, generator=generator) for length in lengths)
    return states.requires_grad_(), context.requires_grad_(), gradient


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
def test_outputs_and_gradients_are_those_of_idefics(activation: str, recompute: bool) -> None:
    theirs = idefics_layer(activation)
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]}
    ours = our_block(activation, **(selective if recompute else {}))
    weights = our_gradients(theirs, "data")
    assert {name for name, _ in ours.named_parameters()} == set(weights)
    ours.load_state_dict(weights, strict=False)

    ranges = torch.tensor(RANGES)
    positions = torch.arange(CONTEXT)
    is_seen = (positions >= ranges[:, :1]) & (positions < ranges[:, 1:])
    states, context, gradient = inputs()
    expected = theirs(
        states.transpose(0, 1),
        image_hidden_states=context.transpose(0, 1),
        image_attention_mask=torch.where(is_seen, 0.0, torch.finfo(torch.float32).min).expand(ROWS, 1, -1, -1),
        cross_attention_gate=is_seen.any(-1).float().expand(ROWS, -1),
    )
    expected.backward(gradient.transpose(0, 1))
    expected_inputs = [tensor.grad for tensor in (states, context)]

    states, context, gradient = inputs()
    result, _ = ours(states, context=context, context_mask=ranges.expand(ROWS, -1, -1))
    result.backward(gradient)
    # Worst seen: outputs 1.9e-6 where the largest is 10; gradients 3.8e-5 of a gate's 73, else 1.8e-5 of 26.
    torch.testing.assert_close(result.transpose(0, 1), expected, rtol=1e-6, atol=1e-5)
    for found, wanted in zip((states.grad, context.grad), expected_inputs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=4e-5)
    gradients = our_gradients(theirs, "grad")
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-6, atol=4e-5, msg=name)


def flamingo(**feed_forward: Any) -> VLMConfig:
    return VLMConfig.model_validate({**FLAMINGO, "fusion": {**FLAMINGO["fusion"], "feed_forward": feed_forward}})


def test_a_width_that_no_layout_divides_is_named() -> None:
    flamingo().fusion.check_layout(30, 8)  # 120
    message = r"model\.fusion\.feed_forward\.ffn_hidden_size=100: is not a multiple of tensor_model_parallel_size=8"
    with pytest.raises(ValueError, match=message):
        flamingo(ffn_hidden_size=100).fusion.check_layout(32, 8)
    with pytest.raises(ValueError, match=r"ffn_hidden_size=40: is not"):
        flamingo().fusion.check_layout(10, 16)
    CrossAttentionConfig().check_layout(30, 7)  # without the feed-forward layer there is nothing to divide
    overrides = ["engine.tensor_model_parallel_size=2", "model.fusion.feed_forward.ffn_hidden_size=4099"]
    with pytest.raises(ValueError, match=r"ffn_hidden_size=4099: is not a multiple of tensor_model_parallel_size=2"):
        check_run(load_recipe(RECIPE, overrides, Recipe), world_size=2)


def test_it_does_not_go_out() -> None:
    parts = ModelParts.of(flamingo())
    with pytest.raises(ValueError, match=r"model\.fusion\.feed_forward \(only cross-attention alone"):
        architecture_of(parts, None)
    architecture_of(ModelParts.of(VLMConfig.model_validate(X)), None)


def test_what_the_language_model_alone_lacks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert _chosen(ModelParts.of(flamingo()), "language").names == ("language",)
    assert "lacks the gated feed-forward layers (model.fusion.feed_forward) that texts go through too" in caplog.text


@pytest.mark.parametrize("architecture", ["IdeficsForVisionText2Text", "MllamaForConditionalGeneration"])
def test_stock_classes_lack_other_things(architecture: str) -> None:
    """What is said of the block against them is no reason for a model that has it."""
    with_block, without = flamingo(), VLMConfig.model_validate(X)
    assert "ours stands inside" in "; ".join(reasons_against(architecture, without))
    assert "ours stands inside" not in "; ".join(reasons_against(architecture, with_block))
