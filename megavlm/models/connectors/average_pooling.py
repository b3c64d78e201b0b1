"""Average pooling to a grid of tokens, then one linear layer: the plainest of MM1's connectors (arXiv 2403.09611)."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.connectors.layers import grid_side, linear, replicated_config, token_side
from megavlm.models.connectors.products import FeatureShape, Products


class AveragePoolingConnectorConfig(Config):
    """Means over windows of the grid of patches. MM1 compares grids of 8 x 8 and 12 x 12 tokens."""

    kind: Literal["average_pooling"] = "average_pooling"
    num_tokens: pydantic.PositiveInt = 144
    """Tokens of a tile, a square number. Where its side does not divide the grid's, windows overlap (torch's
    ``AdaptiveAvgPool2d``)."""
    bias: bool = True
    """Bias of the linear layer."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights."""

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes.

        Raises:
            ValueError: tokens or patches are no square, or the tokens are more than the patches.
        """
        return token_side(self.kind, self.num_tokens, num_patches) ** 2

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        num_vectors = shape.num_tiles * self.tokens_per_tile(shape.num_patches)
        return products.linear(
            "projection", num_vectors, shape.input_size, shape.output_size, needs_features, bias=self.bias
        )

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "AveragePoolingConnector":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, num_tokens, output_size]``.

        Raises:
            ValueError: it is asked for in FP8.
        """
        return AveragePoolingConnector(self, input_size, output_size, megatron_settings)


class AveragePoolingConnector(MegatronModule):
    """Pooling and a linear layer, whole on every tensor-parallel rank."""

    def __init__(
        self,
        config: AveragePoolingConnectorConfig,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
    ) -> None:
        transformer_config = replicated_config(config, megatron_settings)
        super().__init__(transformer_config)
        self.num_tokens = config.num_tokens
        self.projection = linear(transformer_config, input_size, output_size, bias=config.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Pool and project ``[T, P, D]`` -> ``[T, K, hidden]``, tokens row by row."""
        return self.projection(pool_grid(features, token_side("average_pooling", self.num_tokens, features.shape[1])))


def pool_grid(features: Tensor, side: int) -> Tensor:
    """Average a square of patches to a square of ``side``.

    Args:
        features: ``[T, P, D]``, P a square, row by row.
        side: of the square of means.

    Returns:
        ``[T, side * side, D]``, row by row.
    """
    patches_side = grid_side("average_pooling", features.shape[1])
    grid = features.transpose(1, 2).unflatten(2, (patches_side, patches_side))
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)
