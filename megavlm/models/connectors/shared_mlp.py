"""POINTS' connector for several encoders (arXiv 2409.04828): one MLP for all, then a weighted average.

The paper only says that features are averaged before the language model. The released model projects each encoder's
features first, by the same MLP, which is not the same: a GELU stands in between. Shape letters: T tiles, P patches, K
tokens of a tile, D width of an encoder.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.connectors.mlp import MLPConnector, MLPConnectorConfig
from megavlm.models.connectors.products import FeatureShape, Products


class SharedMLPConnectorConfig(Config):
    """An MLP that each encoder's features go through, and the weights of its answers. The defaults are POINTS'."""

    kind: Literal["shared_mlp"] = "shared_mlp"
    weights: list[pydantic.NonNegativeFloat] = pydantic.Field(default=[0.5, 0.5], min_length=2)
    """Weight of each encoder's tokens, in the order of ``model.vision.encoders``; their sum is 1. The paper's own are
    only drawn, not told; the released model has halves."""
    mlp: MLPConnectorConfig = MLPConnectorConfig(bias=True, layernorm=False)
    """The shared MLP: pixel shuffle, two biased layers of the language model's width."""

    @pydantic.model_validator(mode="after")
    def _weights_are_shares(self) -> "SharedMLPConnectorConfig":
        if not math.isclose(sum(self.weights), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"model.connector.weights={self.weights}: their sum is {sum(self.weights):g}, and must be 1. Change "
                "one of them."
            )
        return self

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes.

        Raises:
            ValueError: the patches are not a square of even side, which pixel shuffle needs.
        """
        return self.mlp.tokens_per_tile(num_patches)

    def input_size_of_one(self, input_size: int) -> int:
        """Width D of one encoder's features, of the width of all.

        Raises:
            ValueError: they cannot all have the same.
        """
        if input_size % len(self.weights):
            raise ValueError(
                f"model.connector.weights={self.weights}: are {len(self.weights)}, and model.vision gives features of "
                f"width {input_size}, which so many encoders cannot share. Give a weight to each of "
                "model.vision.encoders, with combine: concatenate there."
            )
        return input_size // len(self.weights)

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        one = shape._replace(input_size=self.input_size_of_one(shape.input_size))
        return [self.mlp.count_products(products.within("mlp"), one, needs_features) for _ in self.weights][-1]

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "SharedMLPConnector":
        """Make the connector: ``[T, P, encoders * D]`` -> ``[T, K, output_size]``.

        Raises:
            ValueError: the encoders cannot share the width, or a width does not divide by the tensor-parallel size.
        """
        mlp = self.mlp.build(self.input_size_of_one(input_size), output_size, megatron_settings, backend)
        return SharedMLPConnector(self, mlp)


class SharedMLPConnector(MegatronModule):
    """The MLP, and the average."""

    def __init__(self, config: SharedMLPConnectorConfig, mlp: MLPConnector) -> None:
        super().__init__(mlp.config)
        self.weights = tuple(config.weights)
        self.mlp = mlp

    def forward(self, features: Tensor) -> Tensor:
        """Project and average.

        Args:
            features: ``[T, P, encoders * D]``, one encoder's behind the other's.

        Returns:
            ``[T, K, hidden]``.
        """
        projected = [self.mlp(part) for part in features.chunk(len(self.weights), dim=-1)]
        averaged = projected[0] * self.weights[0]
        for tokens, weight in zip(projected[1:], self.weights[1:], strict=True):
            averaged = averaged + tokens * weight
        return averaged
