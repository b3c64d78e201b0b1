"""``config.json`` of MegaVLM's own layout, written and read. The layout itself: :mod:`megavlm.convert.own_layout`."""

from collections.abc import Callable, Mapping
from typing import Any

from megavlm.convert.own_layout import ARCHITECTURE, AUTO_MAP, MODEL_TYPE, VISION_RULES
from megavlm.convert.recipe_of.dinov2 import dinov2_tree
from megavlm.convert.recipe_of.language import DECODER_OF_TYPE, decoder_tree
from megavlm.convert.recipe_of.values import Tree, refuse
from megavlm.convert.recipe_of.vision import clip_tree, internvit_tree, siglip_tree
from megavlm.models.config import VLMConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.fusion.cross_attention import CrossAttentionConfig
from megavlm.models.fusion.hybrid import HybridConfig
from megavlm.models.vision.dual import DualConfig

_CONNECTOR_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "ffn_hidden_size",
    "bias": "bias",
    "layernorm": "layernorm",
    "layernorm_epsilon": "layernorm_epsilon",
}
"""Their name -> ours."""
_FUSION_FIELDS: dict[str, tuple[str, ...]] = {
    "decoder_only": (),
    "cross_attention": ("every_n_layers", "first_layer", "text_sees"),
    "hybrid": ("every_n_layers", "first_layer", "text_sees", "tag_integration"),
}
"""Kind -> fields, which are called the same on both sides."""
_WITH_NORM = ("siglip", "dinov2")
"""Kinds of vision encoder that may have a norm after the last layer."""
_TEXT_TYPES = ("llama", "qwen2")


def own_problems(model: VLMConfig) -> list[str]:
    """Name what of a model the layout has no place for."""
    problems = []
    if model.vision.kind not in VISION_RULES:
        problems.append(f"model.vision.kind={model.vision.kind!r} (only {', '.join(VISION_RULES)})")
    if not isinstance(model.connector, MLPConnectorConfig):
        problems.append(f"model.connector.kind={model.connector.kind!r} (only mlp)")
    if model.fusion.kind not in _FUSION_FIELDS:
        problems.append(f"model.fusion.kind={model.fusion.kind!r} (only {', '.join(_FUSION_FIELDS)})")
    if model.gated_feed_forward is not None:
        problems.append("model.fusion.feed_forward (only cross-attention alone, inside the decoder's layers)")
    return problems


def own_config(model: VLMConfig, language: Tree, vision: Tree, image_token_id: int | None) -> Tree:
    """Return the ``config.json`` of a whole model.

    Args:
        model: the model.
        language: configuration of its decoder, as LlamaForCausalLM's or Qwen2ForCausalLM's.
        vision: configuration of its vision encoder, as its stock class's, of the layers that are built.
        image_token_id: the placeholder of image features; None where it is not known.
    """
    assert not isinstance(model.vision, DualConfig), "own_problems names it"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": dict(AUTO_MAP),
        "vision_config": vision,
        "connector": _connector(model),
        "fusion": _fusion(model),
        "text_config": language,
        "keep_class_token": model.vision.keep_class_token,
        "vision_layernorm": bool(getattr(model.vision, "post_layernorm", False)),
        "image_size": model.vision.image_size,
        "image_mean": list(model.vision.image_mean),
        "image_std": list(model.vision.image_std),
        "image_seq_length": model.tokens_per_tile,
        "tie_word_embeddings": model.language.share_embeddings_and_output_weights,
    } | ({} if image_token_id is None else {"image_token_id": image_token_id})


def own_tree(config: Mapping[str, Any]) -> dict[str, Tree]:
    """Return what a ``config.json`` of the layout says, part by part.

    Raises:
        ValueError: a part is missing, or a value is one that MegaVLM has no counterpart for.
    """
    where = "config.json"
    for name in ("vision_config", "connector", "fusion", "text_config"):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{where}: {name}={config.get(name)!r}: is no part of a model. Export it again.")
    text, vision = config["text_config"], config["vision_config"]
    problems = []
    if text.get("model_type") not in _TEXT_TYPES:
        problems.append(f"text_config.model_type={text.get('model_type')!r} (supported: {', '.join(_TEXT_TYPES)})")
    if vision.get("model_type") not in _VISION_TREES:
        found = vision.get("model_type")
        problems.append(f"vision_config.model_type={found!r} (supported: {', '.join(_VISION_TREES)})")
    kind = config["fusion"].get("kind")
    if kind not in _FUSION_FIELDS:
        problems.append(f"fusion.kind={kind!r} (supported: {', '.join(_FUSION_FIELDS)})")
    refuse(problems, where)
    language = decoder_tree(text, DECODER_OF_TYPE[text["model_type"]], f"{where}: text_config")
    language["share_embeddings_and_output_weights"] |= bool(config.get("tie_word_embeddings"))
    fusion = _taken(config, "fusion", {name: name for name in ("kind", *_FUSION_FIELDS[kind])}, where)
    connector = _taken(config, "connector", {"pixel_shuffle": "pixel_shuffle", **_CONNECTOR_FIELDS}, where)
    shuffles = connector.pop("pixel_shuffle")
    if connector["num_layers"] == 1:
        connector["ffn_hidden_size"] = None
    tree = _VISION_TREES[vision["model_type"]](config) | {"select_layer": -1}
    if tree["kind"] in _WITH_NORM:
        tree["post_layernorm"] = bool(config.get("vision_layernorm"))
    if tree["kind"] == "dinov2":  # whose own image size is that of its learned positions
        tree["image_size"] = config.get("image_size")
    tree["keep_class_token"] = bool(config.get("keep_class_token"))
    for name in ("image_mean", "image_std"):
        if name in config:
            tree[name] = tuple(config[name])
    return {
        "vision": tree,
        "connector": {"kind": "mlp", "pixel_shuffle_ratio": 0.5 if shuffles else 1.0, **connector},
        "fusion": fusion,
        "language": language,
    }


_VISION_TREES: dict[str, Callable[[Mapping[str, Any]], Tree]] = {
    "internvl_vision": lambda config: internvit_tree(config["vision_config"], "config.json: vision_config"),
    "clip_vision_model": clip_tree,
    "siglip_vision_model": siglip_tree,
    "dinov2": lambda config: dinov2_tree(config["vision_config"]),
}
"""``model_type`` of a vision tower -> what the whole ``config.json`` says of it."""


def _taken(config: Mapping[str, Any], part: str, names: Mapping[str, str], where: str) -> Tree:
    """The fields of a part under our names.

    Raises:
        ValueError: one is missing, or there are others.
    """
    fields = config[part]
    wrong = sorted(set(names) ^ set(fields))
    if wrong:
        raise ValueError(f"{where}: {part} has {sorted(fields)}, and {sorted(names)} are wanted. Export it again.")
    return {ours: fields[theirs] for theirs, ours in names.items()}


def _connector(model: VLMConfig) -> Tree:
    connector = model.connector
    assert isinstance(connector, MLPConnectorConfig)
    return {
        "pixel_shuffle": connector.pixel_shuffle_ratio == 0.5,
        **{theirs: getattr(connector, ours) for theirs, ours in _CONNECTOR_FIELDS.items()},
        "hidden_size": connector.ffn_hidden_size or model.decoder.hidden_size,
    }


def _fusion(model: VLMConfig) -> Tree:
    fusion = model.fusion
    tree: Tree = {"kind": fusion.kind}
    if isinstance(fusion, CrossAttentionConfig):
        tree |= {
            "every_n_layers": fusion.interval(model.decoder.num_layers),
            "first_layer": fusion.first_layer,
            "text_sees": fusion.text_sees,
        }
    if isinstance(fusion, HybridConfig):
        tree["tag_integration"] = fusion.tag_integration
    return tree
