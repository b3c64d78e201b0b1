"""The model families that are converted: how each one's ``config.json`` is read, and which weight map is its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megavlm.convert import clip, dinov2, internvit, internvl, llama, llava, mixtral, nvlm, own_layout, qwen2, siglip
from megavlm.convert.own_config import own_tree
from megavlm.convert.parts import ModelParts
from megavlm.convert.recipe_of.dinov2 import dinov2_tree
from megavlm.convert.recipe_of.language import decoder_tree
from megavlm.convert.recipe_of.llava import ORIGINAL_DECODERS, llava_tree, original_llava_tree
from megavlm.convert.recipe_of.values import Tree
from megavlm.convert.recipe_of.vision import clip_tree, internvit_tree, original_internvit_tree, siglip_tree
from megavlm.convert.recipe_of.whole import internvl_tree, nvlm_d_tree, original_internvl_tree
from megavlm.convert.weight_map import WeightMap
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.dinov2 import Dinov2Config
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig


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


def _dinov2(parts: ModelParts) -> Dinov2Config:
    assert isinstance(parts.vision, Dinov2Config)
    return parts.vision


def _siglip(parts: ModelParts) -> SiglipConfig:
    assert isinstance(parts.vision, SiglipConfig)
    return parts.vision


_CLIP = Family(lambda config: {"vision": clip_tree(config)}, lambda parts: clip.weight_map(_clip(parts)))
_SIGLIP = Family(lambda config: {"vision": siglip_tree(config)}, lambda parts: siglip.weight_map(_siglip(parts)))
_ORIGINAL_LLAVA = Family(original_llava_tree, lambda parts: llava.original_weight_map(parts.whole()))
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
    "MixtralForCausalLM": Family(
        lambda config: {"language": decoder_tree(config, "MixtralForCausalLM")},
        lambda parts: mixtral.weight_map(_language(parts)),
    ),
    "Qwen2ForCausalLM": Family(
        lambda config: {"language": decoder_tree(config, "Qwen2ForCausalLM")},
        lambda parts: qwen2.weight_map(_language(parts)),
    ),
    "CLIPVisionModel": _CLIP,
    "CLIPModel": _CLIP,
    "SiglipVisionModel": _SIGLIP,
    "SiglipModel": _SIGLIP,
    "Dinov2Model": Family(
        lambda config: {"vision": dinov2_tree(config)}, lambda parts: dinov2.weight_map(_dinov2(parts))
    ),
    "InternVLVisionModel": Family(
        lambda config: {"vision": internvit_tree(config)}, lambda parts: internvit.weight_map(_internvit(parts))
    ),
    "InternVLForConditionalGeneration": Family(internvl_tree, lambda parts: internvl.weight_map(parts.whole())),
    "LlavaForConditionalGeneration": Family(llava_tree, lambda parts: llava.weight_map(parts.whole())),
    **dict.fromkeys(ORIGINAL_DECODERS, _ORIGINAL_LLAVA),
    own_layout.ARCHITECTURE: Family(own_tree, lambda parts: own_layout.weight_map(parts.whole())),
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
