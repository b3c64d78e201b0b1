"""Connectors: a tile's patch features to tokens of the language model's width.

A kind is one file here and one row in :data:`CONNECTORS`. Its config is a pydantic class with ``kind`` and what
:class:`ConnectorConfig` lists; ``build`` makes the module, whose ``forward`` takes ``features [T, P, D]`` and gives
``tokens [T, K, hidden]`` with ``K = tokens_per_tile(P)``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import pydantic
import torch

from megavlm.models.backend import Backend
from megavlm.models.connectors.attention_pooling import AttentionPoolingConnectorConfig
from megavlm.models.connectors.average_pooling import AveragePoolingConnectorConfig
from megavlm.models.connectors.c_abstractor import CAbstractorConfig
from megavlm.models.connectors.linear import LinearConnectorConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.connectors.products import FeatureShape, Products
from megavlm.models.connectors.qformer import QFormerConfig
from megavlm.models.connectors.resampler import ResamplerConfig
from megavlm.models.connectors.shared_mlp import SharedMLPConnectorConfig
from megavlm.models.connectors.visual_abstractor import VisualAbstractorConfig

__all__ = ["CONNECTORS", "AnyConnectorConfig", "ConnectorConfig", "FeatureShape", "Products"]


class ConnectorConfig(Protocol):
    """What the rest of the project asks of a connector's config."""

    kind: str

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes.

        Raises:
            ValueError: the connector cannot take that many patches.
        """

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass, in the order in which they happen, and all parameters by name.

        Args:
            products: takes them.
            shape: of the features.
            needs_features: whether the features' gradient is needed.

        Returns:
            Whether the tokens' gradient is needed.
        """

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int,
    ) -> torch.nn.Module:
        """Make the module, from ``num_patches`` features of width ``input_size`` to tokens of width ``output_size``."""


CONNECTORS: dict[str, type] = {
    "linear": LinearConnectorConfig,
    "mlp": MLPConnectorConfig,
    "shared_mlp": SharedMLPConnectorConfig,
    "average_pooling": AveragePoolingConnectorConfig,
    "attention_pooling": AttentionPoolingConnectorConfig,
    "c_abstractor": CAbstractorConfig,
    "qformer": QFormerConfig,
    "visual_abstractor": VisualAbstractorConfig,
    "resampler": ResamplerConfig,
}

AnyConnectorConfig = Annotated[
    LinearConnectorConfig
    | MLPConnectorConfig
    | SharedMLPConnectorConfig
    | AveragePoolingConnectorConfig
    | AttentionPoolingConnectorConfig
    | CAbstractorConfig
    | QFormerConfig
    | VisualAbstractorConfig
    | ResamplerConfig,
    pydantic.Field(discriminator="kind"),
]
