"""The kinds of vision encoder that are one encoder: what :mod:`megavlm.models.vision.dual` can put together."""

from typing import Annotated

import pydantic

from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.dinov2 import Dinov2Config
from megavlm.models.vision.eva import EvaConfig
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig

SINGLE_ENCODERS: dict[str, type] = {
    "clip": ClipConfig,
    "dinov2": Dinov2Config,
    "eva": EvaConfig,
    "internvit": InternViTConfig,
    "siglip": SiglipConfig,
}

SingleVisionConfig = Annotated[
    ClipConfig | Dinov2Config | EvaConfig | InternViTConfig | SiglipConfig, pydantic.Field(discriminator="kind")
]
