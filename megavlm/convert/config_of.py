"""Writes ``config.json`` files: our model, or a part of it, as ``transformers`` names it, where that can be said."""

from collections.abc import Mapping
from typing import Any

from megavlm.convert.parts import ModelParts
from megavlm.convert.recipe_of import DECODER_FIELDS, INTERNVIT_FIELDS, LLAMA3_ROPE, NORMS
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.fusion.decoder_only import DecoderOnlyConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.internvit import InternViTConfig

Tree = dict[str, Any]

_TORCH_LAYERNORM_EPSILON = 1e-5


def architecture_of(parts: ModelParts) -> str:
    """Return the class of ``transformers`` that a model, or the only part given, can be loaded by.

    Raises:
        ValueError: there is none; names every setting that stands in the way.
    """
    if parts.is_whole:
        _refuse(_whole_problems(parts), "Write a part of it: --part language.")
        return "InternVLForConditionalGeneration"
    if parts.names == ("language",):
        assert parts.language is not None
        return "Qwen2ForCausalLM" if parts.language.add_qkv_bias else "LlamaForCausalLM"
    if parts.names == ("vision",):
        _refuse(_vision_problems(parts), "It stays a run folder.")
        return "InternVLVisionModel"
    raise ValueError(f"parts={parts.names}: are neither a whole model nor one part. Choose --part language or vision.")


def published_config(parts: ModelParts, vocab_size: int | None, carried: Mapping[str, Any]) -> Tree:
    """Return the ``config.json`` of what :func:`architecture_of` gives.

    Args:
        parts: a whole model, or one part.
        vocab_size: rows of the embedding; None without a language model.
        carried: values that a recipe does not know (``max_position_embeddings``, ids of special tokens); those that
            are None are left to their defaults.
    """
    head: Tree = {"architectures": [architecture_of(parts)]}
    carried = {name: value for name, value in carried.items() if value is not None}
    image_token_id = carried.pop("image_token_id", None)
    if parts.names == ("vision",):
        return head | _vision(parts)
    assert parts.language is not None
    assert vocab_size is not None
    language = _language(parts.language, vocab_size) | carried
    if parts.names == ("language",):
        return head | language
    head |= {
        "model_type": "internvl",
        "vision_config": _vision(parts),
        "text_config": language,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_seq_length": parts.whole().tokens_per_tile,
        "tie_word_embeddings": parts.language.share_embeddings_and_output_weights,
    }
    return head if image_token_id is None else head | {"image_token_id": image_token_id}


def _language(config: LanguageConfig, vocab_size: int) -> Tree:
    tree = {theirs: getattr(config, ours) for theirs, ours in DECODER_FIELDS.items()}
    rope = None
    if config.rope_scaling_factor is not None:
        rope = {"rope_type": "llama3", "factor": config.rope_scaling_factor, **LLAMA3_ROPE}
    return tree | {
        "model_type": "qwen2" if config.add_qkv_bias else "llama",
        "vocab_size": vocab_size,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "head_dim": config.kv_channels or config.hidden_size // config.num_attention_heads,
        "hidden_act": "silu",
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "rope_theta": float(config.rotary_base),
        "rope_scaling": rope,
    }


def _vision(parts: ModelParts) -> Tree:
    """InternViT, of as many layers as are built."""
    config = parts.vision
    assert isinstance(config, InternViTConfig)
    tree = {theirs: getattr(config, ours) for theirs, ours in INTERNVIT_FIELDS.items()}
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    return tree | {
        "model_type": "internvl_vision",
        "num_hidden_layers": config.num_layers_built,
        "norm_type": norms[config.normalization],
        "image_size": [config.image_size, config.image_size],
        "patch_size": [config.patch_size, config.patch_size],
        "hidden_act": "gelu",
        "layer_scale_init_value": config.layer_scale,
        "initializer_range": config.init_method_std,
    }


def _vision_problems(parts: ModelParts) -> list[str]:
    if isinstance(parts.vision, InternViTConfig):
        return []
    assert parts.vision is not None
    return [
        f"model.vision.kind={parts.vision.kind!r} (transformers' class has a norm after the last layer, which is not "
        "kept here; internvit can be written)"
    ]


def _whole_problems(parts: ModelParts) -> list[str]:
    """What InternVLForConditionalGeneration has no place for."""
    model = parts.whole()
    problems = _vision_problems(parts)
    if model.vision.keep_class_token:
        problems.append("model.vision.keep_class_token=True (only false)")
    if not isinstance(model.fusion, DecoderOnlyConfig):
        problems.append(f"model.fusion.kind={model.fusion.kind!r} (only decoder_only)")
    connector = model.connector
    if not isinstance(connector, MLPConnectorConfig):
        return [*problems, f"model.connector.kind={connector.kind!r} (only mlp)"]
    width = model.language.hidden_size
    fixed = {
        "num_layers": 2,
        "bias": True,
        "layernorm": True,
        "layernorm_epsilon": _TORCH_LAYERNORM_EPSILON,
        "pixel_shuffle_ratio": 0.5,
    }
    for name, value in fixed.items():
        if getattr(connector, name) != value:
            problems.append(f"model.connector.{name}={getattr(connector, name)!r} (only {value!r})")
    if connector.ffn_hidden_size not in (None, width):
        problems.append(
            f"model.connector.ffn_hidden_size={connector.ffn_hidden_size} (only model.language.hidden_size={width})"
        )
    return problems


def _refuse(problems: list[str], remedy: str) -> None:
    if problems:
        raise ValueError(f"model: transformers has no class for {'; '.join(problems)}. {remedy}")
