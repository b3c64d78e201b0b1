"""Writes the ``config.json`` of vision encoders, each as its class of ``transformers`` has it."""

from collections.abc import Callable, Collection

from megavlm.convert import dinov2
from megavlm.convert.recipe_of.values import Tree
from megavlm.convert.recipe_of.vision import INTERNVIT_FIELDS, NORMS, VISION_FIELDS
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig

_HEAD = "vision.head."


def vision_architecture(config: AnyVisionConfig) -> str:
    """Return the class of ``transformers`` that an encoder alone is written for."""
    return _WRITERS[config.kind][0]


def vision_config(config: AnyVisionConfig, extra: Collection[str] = ()) -> Tree:
    """Return the ``config.json`` of an encoder with all of its layers.

    Args:
        config: of the encoder.
        extra: our keys of tensors that are written beside the model's: a pooling head among them is announced.
    """
    tree = _WRITERS[config.kind][1](config)
    if isinstance(config, SiglipConfig):
        tree["vision_use_head"] = any(key.startswith(_HEAD) for key in extra)
    return tree


def _clip(config: ClipConfig) -> Tree:
    return _fields(config) | {
        "model_type": "clip_vision_model",
        "hidden_act": config.activation,
        "initializer_range": config.init_method_std,
    }


def _siglip(config: SiglipConfig) -> Tree:
    return _fields(config) | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}


def _internvit(config: InternViTConfig) -> Tree:
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    return {theirs: getattr(config, ours) for theirs, ours in INTERNVIT_FIELDS.items()} | {
        "model_type": "internvl_vision",
        "norm_type": norms[config.normalization],
        "image_size": [config.image_size, config.image_size],
        "patch_size": [config.patch_size, config.patch_size],
        "hidden_act": "gelu",
        "layer_scale_init_value": config.layer_scale,
        "initializer_range": config.init_method_std,
    }


def _fields(config: ClipConfig | SiglipConfig) -> Tree:
    tree = {theirs: getattr(config, ours) for theirs, ours in VISION_FIELDS.items()}
    return tree | {"image_size": config.image_size, "patch_size": config.patch_size}


_WRITERS: dict[str, tuple[str, Callable[..., Tree]]] = {
    "clip": ("CLIPVisionModel", _clip),
    "dinov2": ("Dinov2Model", dinov2.published_config),
    "internvit": ("InternVLVisionModel", _internvit),
    "siglip": ("SiglipVisionModel", _siglip),
}
"""Kind -> its class, and what writes its configuration."""
