"""What the ``config.json`` of a vision encoder says."""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from megavlm.convert.recipe_of.values import Tree, refuse, side, unsupported, with_defaults

VISION_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "layer_norm_eps": "layernorm_epsilon",
}
"""Their name -> ours, of every vision encoder."""
INTERNVIT_FIELDS = {**VISION_FIELDS, "use_qk_norm": "qk_layernorm", "attention_bias": "add_qkv_bias"}
_ORIGINAL_INTERNVIT_FIELDS = {**VISION_FIELDS, "qk_normalization": "qk_layernorm", "qkv_bias": "add_qkv_bias"}
NORMS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}
"""Their name of InternViT's norm -> ours."""
ORIGINAL_INTERNVIT_DEFAULTS: Tree = {  # of the released configuration_intern_vit.py
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
}


def clip_tree(config: Mapping[str, Any]) -> Tree:
    """Return what the configuration of a CLIP model, or of its vision tower alone, says of the tower.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json: vision_config" if "vision_config" in config else "config.json"
    full = with_defaults(transformers.CLIPVisionConfig, config.get("vision_config", config), where)
    refuse(unsupported(full, {"hidden_act": ["quick_gelu", "gelu"], "num_channels": [3]}), where)
    return {
        "kind": "clip",
        **{ours: full[theirs] for theirs, ours in VISION_FIELDS.items()},
        "image_size": side(full, "image_size", where),
        "patch_size": side(full, "patch_size", where),
        "activation": full["hidden_act"],
    }


def siglip_tree(config: Mapping[str, Any]) -> Tree:
    """Return what the configuration of a SigLIP model, or of its vision tower alone, says of the tower.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json: vision_config" if "vision_config" in config else "config.json"
    full = with_defaults(transformers.SiglipVisionConfig, config.get("vision_config", config), where)
    refuse(unsupported(full, {"hidden_act": ["gelu_pytorch_tanh"], "num_channels": [3]}), where)
    return {
        "kind": "siglip",
        **{ours: full[theirs] for theirs, ours in VISION_FIELDS.items()},
        "image_size": side(full, "image_size", where),
        "patch_size": side(full, "patch_size", where),
    }


def internvit_tree(config: Mapping[str, Any], where: str = "config.json") -> Tree:
    """Return what the configuration of InternVLVisionModel says.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = with_defaults(transformers.InternVLVisionConfig, config, where)
    allowed: dict[str, Sequence[Any]] = {
        "hidden_act": ["gelu"],
        "norm_type": list(NORMS),
        "num_channels": [3],
        "use_mask_token": [False],
        "use_absolute_position_embeddings": [True],
        "use_mean_pooling": [True],  # else the encoder ends in a norm
    }
    refuse(unsupported(full, allowed), where)
    return _internvit_fields(full, INTERNVIT_FIELDS, where)


def original_internvit_tree(config: Mapping[str, Any], where: str = "config.json") -> Tree:
    """Return what the configuration of the original release's InternVisionModel says.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = ORIGINAL_INTERNVIT_DEFAULTS | dict(config)
    refuse(unsupported(full, {"hidden_act": ["gelu"], "norm_type": list(NORMS), "num_channels": [3]}), where)
    return _internvit_fields(full, _ORIGINAL_INTERNVIT_FIELDS, where)


def _internvit_fields(full: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Tree:
    return {
        "kind": "internvit",
        **{ours: full[theirs] for theirs, ours in fields.items()},
        "normalization": NORMS[full["norm_type"]],
        "image_size": side(full, "image_size", where),
        "patch_size": side(full, "patch_size", where),
    }
