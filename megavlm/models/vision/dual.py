"""Several encoders that see the same tile (POINTS, arXiv 2409.04828: a general CLIP ViT and one trained on text).

Shape letters: T tiles, P patches of a tile, D width of an encoder's features.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.vision.single import SingleVisionConfig
from megavlm.models.vision.transformer import VisionTransformer


class DualConfig(Config):
    """Two encoders or more, and how their features become one."""

    kind: Literal["dual"] = "dual"
    encoders: list[SingleVisionConfig] = pydantic.Field(min_length=2)
    """The encoders. They see the same tiles and give as many features each."""
    combine: Literal["average", "concatenate"] = "average"
    """``average``: one feature for each patch, the encoders' weighted mean. ``concatenate``: side by side, for a
    connector that projects first and averages then (``shared_mlp``, as the released POINTS does)."""
    weights: list[pydantic.NonNegativeFloat] | None = None
    """Of the mean, one for each encoder, with the sum 1; None: equal ones. Only with ``average``."""

    @pydantic.model_validator(mode="after")
    def _encoders_fit(self) -> "DualConfig":
        for name in ("image_size", "num_patches", *(("hidden_size",) if self.combine == "average" else ())):
            values = [getattr(encoder, name) for encoder in self.encoders]
            if len(set(values)) > 1:
                raise ValueError(
                    f"model.vision.encoders: their {name} is {' and '.join(map(str, values))}, and must be the same"
                    f"{' to be averaged' if name == 'hidden_size' else ''}. Change one of them."
                )
        if self.weights is not None and self.combine == "concatenate":
            raise ValueError(
                f"model.vision.weights={self.weights}: combine='concatenate' has no mean. Leave them out, or give them "
                "to model.connector."
            )
        if self.weights is not None and (
            len(self.weights) != len(self.encoders) or not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6)
        ):
            raise ValueError(
                f"model.vision.weights={self.weights}: must be {len(self.encoders)} numbers, one for each encoder, "
                f"with the sum 1; these have the sum {sum(self.weights):g}. Change them."
            )
        return self

    @property
    def image_size(self) -> int:
        """Side of a square tile, pixels."""
        return self.encoders[0].image_size

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        widths = [encoder.hidden_size for encoder in self.encoders]
        return sum(widths) if self.combine == "concatenate" else widths[0]

    @property
    def num_patches(self) -> int:
        """Features P that one tile gives (the class token counts only where it is kept)."""
        return self.encoders[0].num_patches

    @property
    def mean_weights(self) -> tuple[float, ...] | None:
        """Weights of the mean; None: there is none."""
        if self.combine == "concatenate":
            return None
        return tuple(self.weights or [1 / len(self.encoders)] * len(self.encoders))

    def check_layout(self, tensor_model_parallel_size: int) -> None:
        """Check that the encoders can be split.

        Raises:
            ValueError: a feed-forward width does not divide by the tensor-parallel size.
        """
        for encoder in self.encoders:
            encoder.check_layout(tensor_model_parallel_size)

    def build(self, megatron_settings: Mapping[str, Any], backend: Backend) -> "DualEncoder":
        """Make the encoders: ``[T, 3, H, W]`` -> ``[T, P, D]``, or ``[T, P, sum of D]``.

        Raises:
            ValueError: a feed-forward width does not divide by the tensor-parallel size.
        """
        return DualEncoder([encoder.build(megatron_settings, backend) for encoder in self.encoders], self.mean_weights)


class DualEncoder(MegatronModule):
    """Encoders, and their features put together."""

    def __init__(self, encoders: list[VisionTransformer], mean_weights: tuple[float, ...] | None) -> None:
        """Take the encoders; ``mean_weights`` is None where features are put side by side."""
        super().__init__(encoders[0].config)
        self.encoders = torch.nn.ModuleList(encoders)
        self.mean_weights = mean_weights

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tiles: ``[T, 3, H, W]``: uint8 pixels, which each encoder normalises in its way, or floats.

        Returns:
            ``[T, P, D]``, or ``[T, P, sum of D]``.

        Raises:
            ValueError: the tiles have another shape than the encoders take.
        """
        features = [encoder(tiles) for encoder in self.encoders]
        if self.mean_weights is None:
            return torch.cat(features, dim=-1)
        mean = features[0] * self.mean_weights[0]
        for other, weight in zip(features[1:], self.mean_weights[1:], strict=True):
            mean = mean + other * weight
        return mean

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the encoders' sharded state dicts, under ``encoders.0.``, ``encoders.1.`` and so on."""
        sharded: dict[str, Any] = {}
        for number, encoder in enumerate(self.encoders):
            sharded |= sharded_state_dict_default(encoder, f"{prefix}encoders.{number}.", sharded_offsets, metadata)
        return sharded
