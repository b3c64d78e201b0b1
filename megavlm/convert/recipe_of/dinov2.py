"""What the ``config.json`` of a DINOv2 says."""

from collections.abc import Mapping
from typing import Any

import transformers

from megavlm.convert.recipe_of.values import Tree, refuse, side, unsupported, with_defaults


def dinov2_tree(config: Mapping[str, Any]) -> Tree:
    """Return what the configuration of Dinov2Model says. Its image size is that of the learned positions.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json"
    full = with_defaults(transformers.Dinov2Config, config, where)
    problems = unsupported(full, {"num_channels": [3]})
    if not full["use_swiglu_ffn"]:  # SwiGLU does not look at hidden_act
        problems += unsupported(full, {"hidden_act": ["gelu"]})
    refuse(problems, where)
    return {
        "kind": "dinov2",
        "pretrained_image_size": side(full, "image_size", where),
        "patch_size": side(full, "patch_size", where),
        "num_layers": full["num_hidden_layers"],
        "hidden_size": full["hidden_size"],
        "ffn_hidden_size": dinov2_ffn_hidden_size(full["hidden_size"], full["mlp_ratio"], full["use_swiglu_ffn"]),
        "num_attention_heads": full["num_attention_heads"],
        "gated_linear_unit": full["use_swiglu_ffn"],
        "add_qkv_bias": full["qkv_bias"],
        "layernorm_epsilon": full["layer_norm_eps"],
    }


def dinov2_ffn_hidden_size(hidden_size: int, mlp_ratio: int, gated: bool) -> int:
    """Return the width inside the feed-forward layer; with SwiGLU two thirds of it, rounded up to a multiple of 8."""
    width = hidden_size * mlp_ratio
    return -(-int(width * 2 / 3) // 8) * 8 if gated else width
