"""DINOv2, as ``transformers``' Dinov2Model: its weights as its files name them, and its ``config.json``."""

from typing import Any

from megavlm.convert.recipe_of.dinov2 import dinov2_ffn_hidden_size
from megavlm.convert.rules import GroupedQKV, LeadingOnes, Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.vision.dinov2 import Dinov2Config

_MASK_TOKEN = "embeddings.mask_token"
"""Stands for hidden patches in pretraining."""


def encoder_rules(config: Dinov2Config) -> tuple[Rule, ...]:
    """Return the table, without prefixes. SwiGLU's ``weights_in`` is gate and up projection, in our order."""
    qkv = GroupedQKV(config.num_attention_heads, config.num_attention_heads)
    ours, theirs = "encoder.layers.{layer}.", "encoder.layer.{layer}."
    first, second = ("weights_in", "weights_out") if config.gated_linear_unit else ("fc1", "fc2")
    return (
        Rule("embedding.{leaf}", ("embeddings.patch_embeddings.projection.{leaf}",)),
        Rule("embedding.class_token", ("embeddings.cls_token",), LeadingOnes(2)),
        Rule("embedding.positions", ("embeddings.position_embeddings",), LeadingOnes(1)),
        Rule(ours + "input_layernorm.{leaf}", (theirs + "norm1.{leaf}",)),
        Rule(
            ours + "self_attention.linear_qkv.{leaf}",
            tuple(theirs + f"attention.attention.{part}.{{leaf}}" for part in ("query", "key", "value")),
            qkv,
        ),
        Rule(ours + "self_attention.linear_proj.{leaf}", (theirs + "attention.output.dense.{leaf}",)),
        Rule(ours + "self_attn_bda.weight", (theirs + "layer_scale1.lambda1",)),
        Rule(ours + "pre_mlp_layernorm.{leaf}", (theirs + "norm2.{leaf}",)),
        Rule(ours + "mlp.linear_fc1.{leaf}", (theirs + f"mlp.{first}.{{leaf}}",)),
        Rule(ours + "mlp.linear_fc2.{leaf}", (theirs + f"mlp.{second}.{{leaf}}",)),
        Rule(ours + "mlp_bda.weight", (theirs + "layer_scale2.lambda1",)),
        Rule("post_layernorm.{leaf}", ("layernorm.{leaf}",)),
    )


def weight_map(config: Dinov2Config) -> WeightMap:
    """Return the map between ``vision.*`` and a Dinov2Model checkpoint."""
    not_built = tuple(f"encoder.layer.{layer}.*" for layer in range(config.num_layers_built, config.num_layers))
    not_normed = () if config.post_layernorm else ("layernorm.*",)
    return WeightMap(
        rules=under(encoder_rules(config), ours="vision.", theirs=""),
        unused=(_MASK_TOKEN, *not_built, *not_normed),
        idle_norms=() if config.post_layernorm else (("vision.post_layernorm", config.hidden_size),),
    )


def problems(config: Dinov2Config) -> list[str]:
    """Name the settings that Dinov2Model has no place for."""
    if _mlp_ratio(config) is not None:
        return []
    kind = "SwiGLU" if config.gated_linear_unit else "GELU"
    return [
        f"model.vision.ffn_hidden_size={config.ffn_hidden_size} (with {kind} only what a whole mlp_ratio gives for "
        f"hidden_size={config.hidden_size})"
    ]


def published_config(config: Dinov2Config) -> dict[str, Any]:
    """Return the ``config.json`` of the encoder with all of its layers. It has no :func:`problems`."""
    return {
        "model_type": "dinov2",
        "image_size": config.pretrained_image_size,
        "patch_size": config.patch_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "mlp_ratio": _mlp_ratio(config),
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "gelu",
        "use_swiglu_ffn": config.gated_linear_unit,
        "use_mask_token": False,
        "qkv_bias": config.add_qkv_bias,
        "layer_norm_eps": config.layernorm_epsilon,
        "layerscale_value": config.layer_scale,
        "initializer_range": config.init_method_std,
    }


def _mlp_ratio(config: Dinov2Config) -> int | None:
    """The ratio that gives the feed-forward width; None where no whole number does."""
    nearest = round(config.ffn_hidden_size * (1.5 if config.gated_linear_unit else 1.0) / config.hidden_size)
    width = dinov2_ffn_hidden_size(config.hidden_size, nearest, config.gated_linear_unit)
    return nearest if width == config.ffn_hidden_size else None
