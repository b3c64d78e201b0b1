"""Vision encoders: tiles to patch features.

A kind is one file here and one row in :data:`megavlm.models.vision.single.SINGLE_ENCODERS`. Its config is a pydantic
class with ``kind`` and what :class:`VisionConfig` lists; ``build`` makes the module, whose ``forward`` takes ``tiles
[T, 3, H, W]`` (uint8, which it normalises by its own mean and standard deviation, or floats already normalised) and
gives ``features [T, P, D]``.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

import pydantic
import torch

from megavlm.models.backend import Backend
from megavlm.models.vision.dual import DualConfig
from megavlm.models.vision.single import SINGLE_ENCODERS, SingleVisionConfig
from megavlm.models.vision.transformer import VisionTransformerConfig


class VisionConfig(Protocol):
    """What the rest of the project asks of a vision encoder's config."""

    kind: str
    image_size: int
    """Side of a square tile, pixels."""
    hidden_size: int
    """Width D of the features."""

    @property
    def encoders(self) -> Sequence[VisionTransformerConfig]:
        """The encoders that it is made of: itself, or several."""

    @property
    def num_patches(self) -> int:
        """Features P that one tile gives (the class token counts only where it is kept)."""

    def check_layout(self, tensor_model_parallel_size: int) -> None:
        """Check that the encoder can be split over that many ranks.

        Raises:
            ValueError: it cannot; the message says which number does not divide.
        """

    def build(self, megatron_settings: Mapping[str, Any], backend: Backend) -> torch.nn.Module:
        """Make the module. ``megatron_settings`` are the TransformerConfig arguments that come from the layout."""


VISION_ENCODERS: dict[str, type] = {**SINGLE_ENCODERS, "dual": DualConfig}

AnyVisionConfig = Annotated[SingleVisionConfig | DualConfig, pydantic.Field(discriminator="kind")]
