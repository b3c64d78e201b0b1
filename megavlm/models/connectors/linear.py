"""The linear connector (LLaVA, arXiv 2304.08485; VILA, arXiv 2312.07533): one matrix, every patch is a token."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.connectors.mlp import MLPConnector, MLPConnectorConfig
from megavlm.models.connectors.products import FeatureShape, Products


class LinearConnectorConfig(Config):
    """One linear layer: the MLP connector without shuffle, norm and second layer, with its checkpoint keys."""

    kind: Literal["linear"] = "linear"
    bias: bool = True
    """Bias of the layer (LLaVA and VILA: yes)."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights."""

    @property
    def as_mlp(self) -> MLPConnectorConfig:
        """The same as an MLP connector."""
        return MLPConnectorConfig(
            pixel_shuffle_ratio=1.0,
            num_layers=1,
            layernorm=False,
            bias=self.bias,
            init_method_std=self.init_method_std,
        )

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes: as many."""
        return num_patches

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        return self.as_mlp.count_products(products, shape, needs_features)

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> MLPConnector:
        """Make the connector: ``[T, P, input_size]`` -> ``[T, P, output_size]``.

        Raises:
            ValueError: ``output_size`` does not divide by the tensor-parallel size.
        """
        return self.as_mlp.build(input_size, output_size, megatron_settings, backend)
