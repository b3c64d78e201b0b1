"""Writes the ``config.json`` of vision encoders, each as its class of ``transformers`` has it."""

from collections.abc import Callable, Collection

from megavlm.convert import dinov2
from megavlm.convert.recipe_of.values import Tree
from megavlm.convert.recipe_of.vision import INTERNVIT_FIELDS, NORMS, VISION_FIELDS
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.dual import DualConfig
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig

_HEAD = "vision.head."


def vision_architecture(config: AnyVisionConfig) -> str:
    """Return the class of ``transformers`` that an encoder alone is written for.

    Raises:
        ValueError: there is none.
    """
    return _writer(config)[0]


def vision_config(config: AnyVisionConfig, extra: Collection[str] = ()) -> Tree:
    """Return the ``config.json`` of an encoder with all of its layers.

    Args:
        config: of the encoder.
        extra: our keys of tensors that are written beside the model's: a pooling head among them is announced.

    Raises:
        ValueError: there is no class for it, or it stretches its positions and its class does so only when told.
    """
    tree = _writer(config)[1](config)
    assert not isinstance(config, DualConfig), "it has no writer"
    if config.kind != "dinov2" and config.pretrained_image_size not in (None, config.image_size):
        raise ValueError(
            f"model.vision.pretrained_image_size={config.pretrained_image_size}: its positions are stretched to "
            f"image_size={config.image_size}, which {_writer(config)[0]} does only when it is told to. Train with "
            "positions of the tile's size to export it."
        )
    if isinstance(config, SiglipConfig):
        tree["vision_use_head"] = any(key.startswith(_HEAD) for key in extra)
    return tree


def _writer(config: AnyVisionConfig) -> tuple[str, Callable[..., Tree]]:
    if config.kind not in _WRITERS:
        raise ValueError(
            f"model.vision.kind={config.kind!r}: is not written for transformers, which is done for "
            f"{', '.join(_WRITERS)}. --part language writes the language model alone."
        )
    return _WRITERS[config.kind]


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
