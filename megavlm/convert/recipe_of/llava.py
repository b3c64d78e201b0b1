"""What the ``config.json`` of LLaVA and LLaVA-1.5 says, part by part: of ``transformers``', and of the original."""

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import transformers

from megavlm.convert.recipe_of.language import DECODER_OF_TYPE, decoder_tree
from megavlm.convert.recipe_of.values import Tree, refuse, unsupported, with_defaults
from megavlm.convert.recipe_of.vision import clip_tree, siglip_tree

_TOWERS: dict[str, Callable[[Mapping[str, Any]], Tree]] = {
    "clip_vision_model": clip_tree,
    "siglip_vision_model": siglip_tree,
}
"""``model_type`` of a vision tower -> what the whole configuration says of it."""
_STRATEGIES = {"clip": {"default": False, "full": True}, "siglip": {"full": False}}
"""Kind -> feature selection -> whether the class token is kept. On SigLIP ``default`` would drop a patch."""

ORIGINAL_DECODERS = {
    "LlavaLlamaForCausalLM": "LlamaForCausalLM",
    "LlavaMistralForCausalLM": "MistralForCausalLM",
    "LlavaQwenForCausalLM": "Qwen2ForCausalLM",
}
"""The release's architecture -> that of its language model."""
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_NAMED_TOWERS: dict[str, tuple[str, Tree]] = {
    "clip-vit-large-patch14": ("clip_vision_model", {**_LARGE, "patch_size": 14, "image_size": 224}),
    "clip-vit-large-patch14-336": ("clip_vision_model", {**_LARGE, "patch_size": 14, "image_size": 336}),
    "siglip-so400m-patch14-384": ("siglip_vision_model", {**_SO400M, "patch_size": 14, "image_size": 384}),
}
"""Last word of ``mm_vision_tower`` -> its configuration, which the release does not repeat."""
_PROJECTORS = {"linear": 1, "mlp2x_gelu": 2}
"""Their type of connector -> its layers."""


def llava_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what the configuration of LlavaForConditionalGeneration says, part by part.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json"
    full = with_defaults(transformers.LlavaConfig, config, where)
    problems = unsupported(full, {"projector_hidden_act": ["gelu"]})
    layer = full["vision_feature_layer"]
    if not isinstance(layer, int) or layer >= 0:
        problems.append(f"vision_feature_layer={layer!r} (supported: one number below 0)")
    text, tower = full["text_config"], full["vision_config"]
    if text["model_type"] not in DECODER_OF_TYPE:
        problems.append(f"text_config.model_type={text['model_type']!r} (supported: {', '.join(DECODER_OF_TYPE)})")
    if tower["model_type"] not in _TOWERS:
        problems.append(f"vision_config.model_type={tower['model_type']!r} (supported: {', '.join(_TOWERS)})")
    refuse(problems, where)
    vision = _TOWERS[tower["model_type"]](full)
    strategies = _STRATEGIES[vision["kind"]]
    refuse(unsupported(full, {"vision_feature_select_strategy": list(strategies)}), where)
    language = decoder_tree(text, DECODER_OF_TYPE[text["model_type"]], f"{where}: text_config")
    language["share_embeddings_and_output_weights"] |= bool(config.get("tie_word_embeddings"))
    keep = strategies[full["vision_feature_select_strategy"]]
    refuse(_too_deep("vision_feature_layer", layer, vision), where)
    return {
        "vision": _tower(vision, layer, keep_class_token=keep),
        "connector": _connector(2, language["hidden_size"], bias=full["multimodal_projector_bias"]),
        "language": language,
    }


def original_llava_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what the configuration of the authors' release says, part by part. It names its vision tower only.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json"
    full = {
        "mm_projector_type": "linear",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -1,
        "mm_patch_merge_type": "flat",
        **config,
    }
    name = PurePosixPath(str(full.get("mm_vision_tower") or full.get("vision_tower"))).name
    allowed = {
        "mm_projector_type": list(_PROJECTORS),
        "mm_vision_select_feature": ["patch", "cls_patch"],
        "mm_patch_merge_type": ["flat"],
    }
    problems = unsupported(full, allowed)
    layer = full["mm_vision_select_layer"]
    if not isinstance(layer, int) or layer >= 0:
        problems.append(f"mm_vision_select_layer={layer!r} (supported: one number below 0)")
    if name not in _NAMED_TOWERS:
        problems.append(f"mm_vision_tower={name!r} (supported: {', '.join(_NAMED_TOWERS)})")
    elif full.get("mm_hidden_size") not in (None, _NAMED_TOWERS[name][1]["hidden_size"]):
        width = _NAMED_TOWERS[name][1]["hidden_size"]
        problems.append(f"mm_hidden_size={full['mm_hidden_size']} (supported: {width}, the width of {name})")
    refuse(problems, where)
    model_type, tower = _NAMED_TOWERS[name]
    vision = _TOWERS[model_type]({"vision_config": tower})
    refuse(_too_deep("mm_vision_select_layer", layer, vision), where)
    keep = vision["kind"] == "clip" and full["mm_vision_select_feature"] == "cls_patch"
    architecture = next(one for one in config["architectures"] if one in ORIGINAL_DECODERS)
    text = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    language = decoder_tree(text, ORIGINAL_DECODERS[architecture], where)
    return {
        "vision": _tower(vision, layer, keep_class_token=keep),
        "connector": _connector(_PROJECTORS[full["mm_projector_type"]], language["hidden_size"], bias=True),
        "language": language,
    }


def _too_deep(name: str, layer: int, vision: Tree) -> list[str]:
    return [f"{name}={layer} (supported: -1 to -{vision['num_layers']})"] if -layer > vision["num_layers"] else []


def _tower(vision: Tree, layer: int, *, keep_class_token: bool) -> Tree:
    """Features of a layer, before SigLIP's norm behind the last one."""
    tree = vision | {"select_layer": layer, "keep_class_token": keep_class_token}
    return tree | {"post_layernorm": False} if vision["kind"] == "siglip" else tree


def _connector(num_layers: int, width: int, *, bias: bool) -> Tree:
    """LLaVA's: no pixel shuffle, no norm, the language model's width inside."""
    tree: Tree = {"kind": "mlp", "pixel_shuffle_ratio": 1.0, "num_layers": num_layers, "bias": bias, "layernorm": False}
    return tree if num_layers == 1 else tree | {"ffn_hidden_size": width}
