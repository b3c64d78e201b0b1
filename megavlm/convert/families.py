"""The model families that are converted: how each one's ``config.json`` is read, and which weight map is its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megavlm.convert import clip, internvit, internvl, llama, nvlm, qwen2
from megavlm.convert.parts import ModelParts
from megavlm.convert.recipe_of import (
    Tree,
    clip_tree,
    decoder_tree,
    internvit_tree,
    internvl_tree,
    nvlm_d_tree,
    original_internvit_tree,
    original_internvl_tree,
)
from megavlm.convert.weight_map import WeightMap
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.internvit import InternViTConfig


@dataclass(frozen=True)
class Family:
    """One published architecture."""

    read: Callable[[Mapping[str, Any]], dict[str, Tree]]
    """``config.json`` -> part -> what it says of the part."""
    weight_map: Callable[[ModelParts], WeightMap]
    """Names and layouts of its weights."""


def _language(parts: ModelParts) -> LanguageConfig:
    assert parts.language is not None
    return parts.language


def _internvit(parts: ModelParts) -> InternViTConfig:
    assert isinstance(parts.vision, InternViTConfig)
    return parts.vision


def _clip(parts: ModelParts) -> ClipConfig:
    assert isinstance(parts.vision, ClipConfig)
    return parts.vision


_CLIP = Family(lambda config: {"vision": clip_tree(config)}, lambda parts: clip.weight_map(_clip(parts)))
_NVLM_D = Family(nvlm_d_tree, lambda parts: nvlm.weight_map(parts.whole()))

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        lambda config: {"language": decoder_tree(config, "LlamaForCausalLM")},
        lambda parts: llama.weight_map(_language(parts)),
    ),
    "MistralForCausalLM": Family(
        lambda config: {"language": decoder_tree(config, "MistralForCausalLM")},
        lambda parts: llama.weight_map(_language(parts)),
    ),
    "Qwen2ForCausalLM": Family(
        lambda config: {"language": decoder_tree(config, "Qwen2ForCausalLM")},
        lambda parts: qwen2.weight_map(_language(parts)),
    ),
    "CLIPVisionModel": _CLIP,
    "CLIPModel": _CLIP,
    "InternVLVisionModel": Family(
        lambda config: {"vision": internvit_tree(config)}, lambda parts: internvit.weight_map(_internvit(parts))
    ),
    "InternVLForConditionalGeneration": Family(internvl_tree, lambda parts: internvl.weight_map(parts.whole())),
    "InternVisionModel": Family(  # the original release, as the next two
        lambda config: {"vision": original_internvit_tree(config)},
        lambda parts: internvit.original_weight_map(_internvit(parts)),
    ),
    "InternVLChatModel": Family(original_internvl_tree, lambda parts: internvl.original_weight_map(parts.whole())),
    "NVLM_D": _NVLM_D,
    "NVLM_D_Model": _NVLM_D,
}
"""By the name in ``architectures``."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a ``config.json``.

    Raises:
        ValueError: it is none of :data:`FAMILIES`.
    """
    names = config.get("architectures") or []
    known = [FAMILIES[name] for name in names if name in FAMILIES]
    if not known:
        raise ValueError(
            f"config.json: architectures={names} (model_type={config.get('model_type')!r}) cannot be converted. "
            f"Supported: {', '.join(FAMILIES)}."
        )
    return known[0]
