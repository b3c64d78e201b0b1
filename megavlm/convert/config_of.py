"""Writes ``config.json`` files: our model, or a part of it, as ``transformers`` names it, where that can be said."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from megavlm.convert import dinov2, own_layout
from megavlm.convert.mixtral import mixtral_problems
from megavlm.convert.own_config import own_config, own_problems
from megavlm.convert.parts import ModelParts
from megavlm.convert.recipe_of.language import DECODER_FIELDS, LLAMA3_ROPE
from megavlm.convert.recipe_of.values import Tree
from megavlm.convert.stock_class import CANNOT_CARRY, reasons_against
from megavlm.convert.vision_config import vision_architecture, vision_config
from megavlm.models.config import VLMConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.fusion.decoder_only import DecoderOnlyConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.dinov2 import Dinov2Config
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig
from megavlm.runtime.log import LOGGER

_TORCH_LAYERNORM_EPSILON = 1e-5


def architecture_of(parts: ModelParts, wanted: str | None = None) -> str:
    """Return the class that a model, or the only part given, can be loaded by.

    A whole model that no class of ``transformers`` can carry has MegaVLM's own (:mod:`megavlm.convert.own_layout`).

    Args:
        parts: a whole model, or one part.
        wanted: the class to write for; None: the best.

    Raises:
        ValueError: there is none, or it is not the wanted one; names every setting that stands in the way.
    """
    if parts.is_whole:
        return _whole_architecture(parts, wanted)
    fitting = _part_architecture(parts)
    if wanted not in (None, fitting):
        raise ValueError(
            f"--architecture={wanted}: cannot carry the {' and '.join(parts.names)} of this model, which is written as "
            f"{fitting}. Leave the option out."
        )
    return fitting


def _whole_architecture(parts: ModelParts, wanted: str | None) -> str:
    """The first class without problems, and MegaVLM's own where all have some; or the wanted one."""
    moe = parts.whole().language.moe
    if moe is not None:
        experts = f"model.language.moe.num_moe_experts={moe.num_moe_experts}"
        _refuse([f"a whole model with {experts}"], "Its language model goes out alone: --part language.")
    own = own_layout.ARCHITECTURE
    if wanted in CANNOT_CARRY:
        reasons = "; ".join(reasons_against(wanted, parts.whole()))
        raise ValueError(f"--architecture={wanted}: cannot carry this model: {reasons}. Leave it out to write {own}.")
    problems = {name: find(parts) for name, find in _WHOLE_CLASSES.items()}
    if wanted == own or (wanted is None and all(problems.values())):
        _refuse(own_problems(parts.whole()), "Such a model stays a run folder; its language model goes out alone.")
    if wanted is None:
        fitting = next((name for name, found in problems.items() if not found), None)
        if fitting is None:
            why = "; ".join(f"{name} has no place for {', '.join(found)}" for name, found in problems.items())
            LOGGER.info("%s, MegaVLM's own layout, is written, because no class of transformers fits: %s", own, why)
        return fitting or own
    if wanted != own and wanted not in problems:
        known = ", ".join([*problems, own, *CANNOT_CARRY])
        raise ValueError(f"--architecture={wanted}: is no class that whole models are written for. Choose of {known}.")
    if problems.get(wanted):
        raise ValueError(
            f"--architecture={wanted}: has no place for {'; '.join(problems[wanted])}. Leave it out to write {own}."
        )
    return wanted


def _part_architecture(parts: ModelParts) -> str:
    if parts.names == ("language",):
        assert parts.language is not None
        if parts.language.moe is not None:
            _refuse(mixtral_problems(parts.language), "It stays a run folder.")
            return "MixtralForCausalLM"
        return "Qwen2ForCausalLM" if parts.language.add_qkv_bias else "LlamaForCausalLM"
    if parts.names == ("vision",):
        if isinstance(parts.vision, Dinov2Config):
            _refuse(dinov2.problems(parts.vision), "It stays a run folder.")
        assert parts.vision is not None
        return vision_architecture(parts.vision)
    raise ValueError(f"parts={parts.names}: are neither a whole model nor one part. Choose --part language or vision.")


def published_config(
    parts: ModelParts,
    vocab_size: int | None,
    carried: Mapping[str, Any],
    architecture: str | None = None,
    *,
    extra: Collection[str] = (),
) -> Tree:
    """Return the ``config.json`` of what :func:`architecture_of` gives.

    Args:
        parts: a whole model, or one part.
        vocab_size: rows of the embedding; None without a language model.
        carried: values that a recipe does not know (``max_position_embeddings``, ids of special tokens); those that
            are None are left to their defaults.
        architecture: the class to write for; None: the best.
        extra: our keys of tensors that are written beside the model's.
    """
    architecture = architecture or architecture_of(parts)
    head: Tree = {"architectures": [architecture]}
    carried = {name: value for name, value in carried.items() if value is not None}
    image_token_id = carried.pop("image_token_id", None)
    vision: Tree = {} if parts.vision is None else vision_config(parts.vision, extra)
    if parts.names == ("vision",):
        return head | vision
    assert parts.language is not None
    assert vocab_size is not None
    language = _language(parts.language, vocab_size) | carried
    if parts.names == ("language",):
        return head | language
    if architecture == own_layout.ARCHITECTURE:
        return own_config(parts.whole(), language, vision, image_token_id)
    model = parts.whole()
    assert isinstance(model.vision, ClipConfig | InternViTConfig | SiglipConfig), "the others' problems are named"
    head |= {
        "vision_config": vision,
        "text_config": language,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": model.vision.select_layer,
        "image_seq_length": model.tokens_per_tile,
        "tie_word_embeddings": parts.language.share_embeddings_and_output_weights,
    }
    head |= _llava(model) if architecture == "LlavaForConditionalGeneration" else _INTERNVL
    name = "image_token_index" if architecture == "LlavaForConditionalGeneration" else "image_token_id"
    return head if image_token_id is None else head | {name: image_token_id}


_INTERNVL: Tree = {"model_type": "internvl", "downsample_ratio": 0.5, "vision_feature_select_strategy": "default"}


def _llava(model: VLMConfig) -> Tree:
    assert isinstance(model.vision, ClipConfig | SiglipConfig), "_llava_problems names others"
    assert isinstance(model.connector, MLPConnectorConfig), "_llava_problems names others"
    keeps_all = model.vision.keep_class_token or not model.vision.has_class_token
    return {
        "model_type": "llava",
        "vision_feature_select_strategy": "full" if keeps_all else "default",
        "multimodal_projector_bias": model.connector.bias,
    }


def _language(config: LanguageConfig, vocab_size: int) -> Tree:
    tree = {theirs: getattr(config, ours) for theirs, ours in DECODER_FIELDS.items()} | _experts(config)
    rope = None
    if config.rope_scaling_factor is not None:
        rope = {"rope_type": "llama3", "factor": config.rope_scaling_factor, **LLAMA3_ROPE}
    return tree | {
        "model_type": "qwen2" if config.add_qkv_bias else "llama" if config.moe is None else "mixtral",
        "vocab_size": vocab_size,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "head_dim": config.head_channels,
        "hidden_act": "silu",
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_method_std,
        "rope_theta": float(config.rotary_base),
        "rope_scaling": rope,
    }


def _experts(config: LanguageConfig) -> Tree:
    """A Mixtral's fields. Its coefficient is ours divided by k (:mod:`megavlm.convert.recipe_of.language`)."""
    moe = config.moe
    if moe is None:
        return {}
    balances = moe.moe_router_load_balancing_type != "none"
    for name in ("moe_z_loss_coeff", "moe_router_load_balancing_type"):
        if (value := getattr(moe, name)) not in (None, "aux_loss"):
            LOGGER.info("model.language.moe.%s=%s: config.json has no place for it (training only)", name, value)
    return {
        "intermediate_size": moe.moe_ffn_hidden_size or config.ffn_hidden_size,
        "num_local_experts": moe.num_moe_experts,
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff / moe.moe_router_topk if balances else 0.0,
        "sliding_window": None,
    }


def _internvl_problems(parts: ModelParts) -> list[str]:
    """What InternVLForConditionalGeneration has no place for."""
    vision = parts.whole().vision
    problems = _not_of_kinds(vision.kind, ("internvit",))
    if isinstance(vision, InternViTConfig) and vision.keep_class_token:
        problems.append("model.vision.keep_class_token=True (only false)")
    fixed = {
        "num_layers": 2,
        "bias": True,
        "layernorm": True,
        "layernorm_epsilon": _TORCH_LAYERNORM_EPSILON,
        "pixel_shuffle_ratio": 0.5,
    }
    return problems + _other_problems(parts, fixed)


def _llava_problems(parts: ModelParts) -> list[str]:
    """What LlavaForConditionalGeneration has no place for."""
    vision = parts.whole().vision
    problems = _not_of_kinds(vision.kind, ("clip", "siglip"))
    if isinstance(vision, SiglipConfig) and vision.post_layernorm:
        problems.append("model.vision.post_layernorm=True (only false)")
    return problems + _other_problems(parts, {"num_layers": 2, "layernorm": False, "pixel_shuffle_ratio": 1.0})


def _not_of_kinds(kind: str, kinds: tuple[str, ...]) -> list[str]:
    return [] if kind in kinds else [f"model.vision.kind={kind!r} (only {' or '.join(kinds)})"]


def _other_problems(parts: ModelParts, fixed: Mapping[str, Any]) -> list[str]:
    """What is no connector with the fixed fields and the language model's width inside, or no decoder-only model."""
    model = parts.whole()
    problems = []
    if not isinstance(model.fusion, DecoderOnlyConfig):
        problems.append(f"model.fusion.kind={model.fusion.kind!r} (only decoder_only)")
    connector = model.connector
    if not isinstance(connector, MLPConnectorConfig):
        return [*problems, f"model.connector.kind={connector.kind!r} (only mlp)"]
    width = model.decoder.hidden_size
    for name, value in fixed.items():
        if getattr(connector, name) != value:
            problems.append(f"model.connector.{name}={getattr(connector, name)!r} (only {value!r})")
    if connector.ffn_hidden_size not in (None, width):
        problems.append(
            f"model.connector.ffn_hidden_size={connector.ffn_hidden_size} (only model.language.hidden_size={width})"
        )
    return problems


_WHOLE_CLASSES: dict[str, Callable[[ModelParts], list[str]]] = {
    "InternVLForConditionalGeneration": _internvl_problems,
    "LlavaForConditionalGeneration": _llava_problems,
}
"""Class of ``transformers`` for whole models -> the settings of a model that it has no place for; the best first."""


def _refuse(problems: list[str], remedy: str) -> None:
    if problems:
        raise ValueError(f"model: transformers has no class for {'; '.join(problems)}. {remedy}")
