"""Reads ``config.json`` files: what they say of a model, as the fields of a recipe's model part.

Only what a file states comes out (a tree of plain values), so that a recipe can be compared with it. What MegaVLM has
no counterpart for is an error that names each such value, never left out in silence. Values that files leave to their
default come from the configuration classes of ``transformers``; no code of a folder is run.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from megavlm.runtime.log import LOGGER

Tree = dict[str, Any]

DECODER_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
"""Their name -> ours, of decoders."""
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
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's stretching of rotary frequencies is fixed to."""

_ORIGINAL_INTERNVIT_DEFAULTS: Tree = {  # of the released configuration_intern_vit.py
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
_DECODERS: dict[str, type[transformers.PreTrainedConfig]] = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
}
_DECODER_OF_TYPE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}
_NO_OTHER = "MegaVLM has no model like that, so the folder cannot be converted."


def decoder_tree(config: Mapping[str, Any], architecture: str, where: str = "config.json") -> Tree:
    """Return what a decoder's configuration says.

    Args:
        config: of LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM.
        architecture: which of them.
        where: the configuration's name in errors.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = _with_defaults(_DECODERS[architecture], config, where)
    allowed: dict[str, Sequence[Any]] = {"hidden_act": ["silu"]}
    if architecture == "LlamaForCausalLM":
        allowed |= {"attention_bias": [False], "mlp_bias": [False]}
    if architecture == "Qwen2ForCausalLM":
        allowed |= {"use_sliding_window": [False]}
    problems = _unsupported(full, allowed)
    window, positions = full.get("sliding_window"), full["max_position_embeddings"]
    if architecture == "MistralForCausalLM" and window is not None and window < positions:
        problems.append(f"sliding_window={window} (below max_position_embeddings={positions}; supported: null)")
    rope = full["rope_parameters"]
    problems += _unsupported_rope(rope)
    _refuse(problems, where)
    if rope["rope_type"] == "dynamic":
        LOGGER.info(
            "%s: rope_type=dynamic only stretches rows of more than max_position_embeddings=%d tokens; MegaVLM never "
            "does: keep to shorter rows",
            where,
            positions,
        )
    tree = {ours: full[theirs] for theirs, ours in DECODER_FIELDS.items()}
    return tree | {
        "kv_channels": full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"],
        "add_qkv_bias": architecture == "Qwen2ForCausalLM",
        "rotary_base": int(rope["rope_theta"]),
        "rope_scaling_factor": float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
    }


def clip_tree(config: Mapping[str, Any]) -> Tree:
    """Return what the configuration of a CLIP model, or of its vision tower alone, says of the tower.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json: vision_config" if "vision_config" in config else "config.json"
    full = _with_defaults(transformers.CLIPVisionConfig, config.get("vision_config", config), where)
    _refuse(_unsupported(full, {"hidden_act": ["quick_gelu", "gelu"], "num_channels": [3]}), where)
    return {
        "kind": "clip",
        **{ours: full[theirs] for theirs, ours in VISION_FIELDS.items()},
        "image_size": _side(full, "image_size", where),
        "patch_size": _side(full, "patch_size", where),
        "activation": full["hidden_act"],
    }


def internvit_tree(config: Mapping[str, Any], where: str = "config.json") -> Tree:
    """Return what the configuration of InternVLVisionModel says.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = _with_defaults(transformers.InternVLVisionConfig, config, where)
    allowed: dict[str, Sequence[Any]] = {
        "hidden_act": ["gelu"],
        "norm_type": list(NORMS),
        "num_channels": [3],
        "use_mask_token": [False],
        "use_absolute_position_embeddings": [True],
        "use_mean_pooling": [True],  # else the encoder ends in a norm
    }
    _refuse(_unsupported(full, allowed), where)
    return _internvit_fields(full, INTERNVIT_FIELDS, where)


def original_internvit_tree(config: Mapping[str, Any], where: str = "config.json") -> Tree:
    """Return what the configuration of the original release's InternVisionModel says.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = _ORIGINAL_INTERNVIT_DEFAULTS | dict(config)
    _refuse(_unsupported(full, {"hidden_act": ["gelu"], "norm_type": list(NORMS), "num_channels": [3]}), where)
    return _internvit_fields(full, _ORIGINAL_INTERNVIT_FIELDS, where)


def internvl_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what the configuration of InternVLForConditionalGeneration says, part by part.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = _with_defaults(transformers.InternVLConfig, config, "config.json")
    allowed: dict[str, Sequence[Any]] = {
        "downsample_ratio": [0.5],
        "projector_hidden_act": ["gelu"],
        "vision_feature_select_strategy": ["default"],
    }
    problems = _unsupported(full, allowed)
    if not isinstance(full["vision_feature_layer"], int) or full["vision_feature_layer"] >= 0:
        problems.append(f"vision_feature_layer={full['vision_feature_layer']!r} (supported: one number below 0)")
    text = full["text_config"]
    if text["model_type"] not in _DECODER_OF_TYPE:
        problems.append(f"text_config.model_type={text['model_type']!r} (supported: {', '.join(_DECODER_OF_TYPE)})")
    _refuse(problems, "config.json")
    language = decoder_tree(text, _DECODER_OF_TYPE[text["model_type"]], "config.json: text_config")
    # transformers ties by the outer value, which older files leave to the inner one
    language["share_embeddings_and_output_weights"] |= bool(config.get("tie_word_embeddings"))
    vision = internvit_tree(full["vision_config"], "config.json: vision_config")
    return {
        "vision": vision | {"select_layer": full["vision_feature_layer"], "keep_class_token": False},
        "connector": _connector(bias=True, width=language["hidden_size"]),
        "language": language,
    }


def original_internvl_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what the configuration of the original InternVLChatModel says, part by part.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    return _original_tree(config, bias=True)


def nvlm_d_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what the configuration of NVLM-D says, part by part: its connector has no bias and is wide inside.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    return _original_tree(config, bias=False)


def _original_tree(config: Mapping[str, Any], *, bias: bool) -> dict[str, Tree]:
    vision, text = (config.get(name) for name in ("vision_config", "llm_config"))
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError("config.json: has no vision_config or no llm_config. Download it again.")
    full = {"downsample_ratio": 0.5, "ps_version": "v1", "select_layer": -1, **config}
    problems = _unsupported(full, {"downsample_ratio": [0.5], "ps_version": ["v2"]})
    architecture = (text.get("architectures") or ["LlamaForCausalLM"])[0]
    if architecture not in _DECODERS:
        problems.append(f"llm_config.architectures={architecture!r} (supported: {', '.join(_DECODERS)})")
    image_size = vision.get("image_size", _ORIGINAL_INTERNVIT_DEFAULTS["image_size"])
    if full.get("force_image_size") not in (None, image_size):
        problems.append(f"force_image_size={full['force_image_size']} (supported: vision_config's {image_size})")
    _refuse(problems, "config.json")
    language = decoder_tree(text, architecture, "config.json: llm_config")
    return {
        "vision": original_internvit_tree(vision, "config.json: vision_config")
        | {"select_layer": full["select_layer"], "keep_class_token": False},
        "connector": _connector(bias=bias, width=language["hidden_size" if bias else "ffn_hidden_size"]),
        "language": language,
    }


def _connector(*, bias: bool, width: int) -> Tree:
    """InternVL's: pixel shuffle, LayerNorm as torch has it, two layers with ``width`` between them."""
    return {
        "kind": "mlp",
        "pixel_shuffle_ratio": 0.5,
        "num_layers": 2,
        "ffn_hidden_size": width,
        "bias": bias,
        "layernorm": True,
        "layernorm_epsilon": 1e-5,
    }


def _internvit_fields(full: Mapping[str, Any], fields: Mapping[str, str], where: str) -> Tree:
    return {
        "kind": "internvit",
        **{ours: full[theirs] for theirs, ours in fields.items()},
        "normalization": NORMS[full["norm_type"]],
        "image_size": _side(full, "image_size", where),
        "patch_size": _side(full, "patch_size", where),
    }


def _with_defaults(kind: type[transformers.PreTrainedConfig], config: Mapping[str, Any], where: str) -> Tree:
    """The configuration with every value spelt out, in the spelling of the installed transformers."""
    try:
        return dict(kind.from_dict(copy.deepcopy(dict(config))).to_dict())
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: is not one of a {kind.model_type} model ({reason}). Download it again.") from None


def _unsupported(config: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]]) -> list[str]:
    return [
        f"{name}={config[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if config.get(name, values[0]) not in values
    ]


def _unsupported_rope(rope: Mapping[str, Any]) -> list[str]:
    problems = _unsupported(rope, {"rope_type": ["default", "llama3", "dynamic"], "partial_rotary_factor": [1.0]})
    if rope["rope_type"] == "llama3":
        problems += _unsupported(rope, {name: [value] for name, value in LLAMA3_ROPE.items()})
    if rope["rope_theta"] != int(rope["rope_theta"]):
        problems.append(f"rope_theta={rope['rope_theta']} (supported: whole numbers)")
    return problems


def _refuse(problems: Sequence[str], where: str) -> None:
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}. {_NO_OTHER}")


def _side(config: Mapping[str, Any], name: str, where: str) -> int:
    """A size that is one number, or two equal ones."""
    value = config[name]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        _refuse([f"{name}={value} (supported: squares)"], where)
    return int(sides.pop())
