"""Q-Former and Perceiver resampler against the classes of ``transformers``: outputs and gradients in float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import Blip2QFormerConfig, Blip2QFormerModel, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from megavlm.models.backend import BACKENDS
from megavlm.models.connectors.layers import replicated_config
from megavlm.models.connectors.qformer import QFormer, QFormerConfig
from megavlm.models.connectors.resampler import ResamplerConfig
from megavlm.runtime import process

SETTINGS: dict[str, Any] = {"params_dtype": torch.float32, "perform_initialization": False}
TORCH = BACKENDS["torch"]
WIDTH = 20

# Worst seen: 1.5e-6 of the largest value (sums in another order).
TOLERANCE = 1e-5

_ATTENTION = {"query": "query", "key": "key", "value": "value"}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def draw(module: torch.nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def difference(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    # a gradient that is zero but for rounding (a key's bias) has no scale of its own
    return float((found - expected).detach().abs().max() / max(0.1, float(expected.detach().abs().max())))


def compare(ours: torch.nn.Module, theirs: torch.nn.Module, names: dict[str, str]) -> float:
    """Largest difference of gradients; ``names``: their parameter -> ours."""
    own = dict(ours.named_parameters())
    return max(difference(own[names[name]].grad, weight.grad) for name, weight in theirs.named_parameters())


def copy(ours: torch.nn.Module, theirs: torch.nn.Module, names: dict[str, str]) -> None:
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            own[names[name]].copy_(weight)


def qformer_names(theirs: torch.nn.Module) -> dict[str, str]:
    renamed = {
        "encoder.layer.": "layers.",
        ".crossattention.attention.": ".cross_attention.",
        ".crossattention.output.dense.": ".cross_attention.output.",
        ".crossattention.output.LayerNorm.": ".cross_attention_norm.",
        ".attention.attention.": ".self_attention.",
        ".attention.output.dense.": ".self_attention.output.",
        ".attention.output.LayerNorm.": ".self_attention_norm.",
        ".intermediate_query.dense.": ".query_ffn.up.",
        ".output_query.dense.": ".query_ffn.down.",
        ".output_query.LayerNorm.": ".query_ffn.norm.",
        ".intermediate.dense.": ".text_ffn.up.",
        ".output.dense.": ".text_ffn.down.",
        ".output.LayerNorm.": ".text_ffn.norm.",
    }
    names = {}
    for name, _ in theirs.named_parameters():
        ours = name
        for their_part, our_part in renamed.items():
            if their_part == ".output.dense." and ".self_attention.output." in ours:
                continue
            ours = ours.replace(their_part, our_part)
        names[name] = ours
    return names


def qformers(*, has_text: bool) -> tuple[QFormer, Blip2QFormerModel]:
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=24,
            num_hidden_layers=5,
            num_attention_heads=3,
            intermediate_size=40,
            encoder_hidden_size=WIDTH,
            use_qformer_text_input=has_text,
            cross_attention_frequency=2,
        )
    ).eval()
    draw(theirs)
    config = QFormerConfig(num_tokens=4, num_layers=5, hidden_size=24, ffn_hidden_size=40, num_attention_heads=3)
    settings = replicated_config(config, SETTINGS, config.layernorm_epsilon)
    ours = QFormer(config, settings, WIDTH, 28, TORCH, has_text=has_text)
    draw(ours)
    copy(ours, theirs, qformer_names(theirs))
    return ours, theirs


def test_qformer_reads_as_blip2() -> None:
    ours, theirs = qformers(has_text=False)
    mapped = qformer_names(theirs).values()
    left = {name for name, _ in ours.named_parameters()} - set(mapped)
    assert left == {"queries", "projection.weight", "projection.bias"}
    features = torch.randn(3, 17, WIDTH)
    own_features, their_features = (features.clone().requires_grad_() for _ in range(2))
    expected = theirs(query_embeds=ours.queries.detach().expand(3, -1, -1), encoder_hidden_states=their_features)
    found = ours.read(own_features)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.last_hidden_state.backward(upstream)
    differences = [
        difference(found, expected.last_hidden_state),
        difference(own_features.grad, their_features.grad),
        compare(ours, theirs, qformer_names(theirs)),
    ]
    assert max(differences) < TOLERANCE, differences
    assert torch.equal(ours(features), ours.projection(ours.read(features)))


@pytest.mark.parametrize("sees", ["all", "own kind", "text is causal"])
def test_qformer_takes_text_beside_the_queries(sees: str) -> None:
    ours, theirs = qformers(has_text=True)
    features, text = torch.randn(2, 9, WIDTH), torch.randn(2, 6, 24)
    states = torch.cat((ours.queries.detach().expand(2, -1, -1), text), dim=1)
    is_text = torch.arange(10) >= 4
    hidden = {
        "all": torch.zeros(10, 10, dtype=torch.bool),
        "own kind": is_text[:, None] != is_text,
        "text is causal": (is_text & ~is_text[:, None])
        | (is_text & is_text[:, None] & torch.ones(10, 10).triu(1).bool()),
    }[sees]
    found = ours.run_layers(states, features, None if sees == "all" else hidden[None, None])
    expected = theirs(
        query_embeds=states,
        query_length=4,
        attention_mask=None if sees == "all" else ~hidden[None, None].expand(2, 1, -1, -1),
        encoder_hidden_states=features,
    ).last_hidden_state
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    differences = [difference(found, expected), compare(ours, theirs, qformer_names(theirs))]
    assert max(differences) < TOLERANCE, differences


def test_qformer_takes_text_alone() -> None:
    ours, theirs = qformers(has_text=True)
    text = torch.randn(2, 6, 24)
    expected = theirs(query_embeds=text, query_length=0).last_hidden_state
    assert difference(ours.run_layers(text, None), expected) < TOLERANCE


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_resampler_computes_as_idefics(qk_layernorm: bool) -> None:
    settings = IdeficsConfig(
        vision_config={"embed_dim": WIDTH}, perceiver_config={"qk_layer_norms_perceiver": qk_layernorm}
    )
    theirs = IdeficsPerceiverResampler(settings, WIDTH, depth=2, n_heads=3, head_dim=6, n_latents=5)
    draw(theirs)
    config = ResamplerConfig(
        num_tokens=5,
        num_layers=2,
        num_attention_heads=3,
        kv_channels=6,
        activation="relu",
        qk_layernorm=qk_layernorm,
    )
    ours = config.build(WIDTH, 28, SETTINGS, TORCH)
    draw(ours)
    renamed = {
        "blocks.": "layers.",
        ".0.context_layer_norm.": ".feature_norm.",
        ".0.latents_layer_norm.": ".latent_norm.",
        ".0.q_layer_norm.": ".attention.query_norm.",
        ".0.k_layer_norm.": ".attention.key_norm.",
        ".0.q_proj.": ".attention.query.",
        ".0.k_proj.": ".attention.key.",
        ".0.v_proj.": ".attention.value.",
        ".0.output_proj.": ".attention.output.",
        ".1.ln.": ".ffn_norm.",
        ".1.fc.": ".up.",
        ".1.c_proj.": ".down.",
        "layer_norm.": "layernorm.",
    }
    names = {}
    for name, _ in theirs.named_parameters():
        names[name] = name
        for their_part, our_part in renamed.items():
            names[name] = names[name].replace(their_part, our_part)
    copy(ours, theirs, names)
    features = torch.randn(3, 17, WIDTH)
    own_features, their_features = (features.clone().requires_grad_() for _ in range(2))
    found, expected = ours.resample(own_features), theirs(their_features)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    differences = [
        difference(found, expected),
        difference(own_features.grad, their_features.grad),
        compare(ours, theirs, names),
    ]
    assert max(differences) < TOLERANCE, differences


def test_squared_relu_is_flamingos() -> None:
    config = ResamplerConfig(num_tokens=2, num_layers=1, num_attention_heads=2, kv_channels=4)
    assert config.activation == "squared_relu"
    ours = config.build(WIDTH, 28, SETTINGS, TORCH)
    draw(ours)
    layer = ours.layers[0]
    layer.attention.output.weight.data.zero_()
    latents = torch.randn(1, 2, WIDTH)
    inner = layer.up(layer.ffn_norm(latents)).clamp(min=0)
    assert torch.allclose(layer(latents, torch.randn(1, 3, WIDTH)), latents + layer.down(inner * inner), atol=1e-5)
