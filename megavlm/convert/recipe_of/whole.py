"""What the ``config.json`` of a whole model says, part by part."""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from megavlm.convert.recipe_of.language import DECODER_OF_TYPE, DECODERS, decoder_tree
from megavlm.convert.recipe_of.values import Tree, refuse, unsupported, with_defaults
from megavlm.convert.recipe_of.vision import ORIGINAL_INTERNVIT_DEFAULTS, internvit_tree, original_internvit_tree


def internvl_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what the configuration of InternVLForConditionalGeneration says, part by part.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = with_defaults(transformers.InternVLConfig, config, "config.json")
    allowed: dict[str, Sequence[Any]] = {
        "downsample_ratio": [0.5],
        "projector_hidden_act": ["gelu"],
        "vision_feature_select_strategy": ["default"],
    }
    problems = unsupported(full, allowed)
    if not isinstance(full["vision_feature_layer"], int) or full["vision_feature_layer"] >= 0:
        problems.append(f"vision_feature_layer={full['vision_feature_layer']!r} (supported: one number below 0)")
    text = full["text_config"]
    if text["model_type"] not in DECODER_OF_TYPE:
        problems.append(f"text_config.model_type={text['model_type']!r} (supported: {', '.join(DECODER_OF_TYPE)})")
    refuse(problems, "config.json")
    language = decoder_tree(text, DECODER_OF_TYPE[text["model_type"]], "config.json: text_config")
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
    problems = unsupported(full, {"downsample_ratio": [0.5], "ps_version": ["v2"]})
    architecture = (text.get("architectures") or ["LlamaForCausalLM"])[0]
    if architecture not in DECODERS:
        problems.append(f"llm_config.architectures={architecture!r} (supported: {', '.join(DECODERS)})")
    image_size = vision.get("image_size", ORIGINAL_INTERNVIT_DEFAULTS["image_size"])
    if full.get("force_image_size") not in (None, image_size):
        problems.append(f"force_image_size={full['force_image_size']} (supported: vision_config's {image_size})")
    refuse(problems, "config.json")
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
