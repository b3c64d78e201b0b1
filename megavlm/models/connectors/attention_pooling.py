"""Attention pooling by learned queries (MM1, arXiv 2403.09611).

The paper names it and its number of queries (64 or 144) and says no more; this is one layer of multi-head attention
over normalised features, and a linear layer. Shape letters: T tiles, P patches, K queries, D width.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.connectors.layers import (
    Attention,
    AttentionShape,
    check_heads,
    count_attention,
    layer_norm,
    learned,
    linear,
    replicated_config,
)
from megavlm.models.connectors.products import FeatureShape, Products


class AttentionPoolingConnectorConfig(Config):
    """Learned queries that read a tile's features once."""

    kind: Literal["attention_pooling"] = "attention_pooling"
    num_tokens: pydantic.PositiveInt = 144
    """Learned queries, which are the tokens of a tile."""
    hidden_size: pydantic.PositiveInt = 1024
    """Width of the queries and of the attention."""
    num_attention_heads: pydantic.PositiveInt = 16
    layernorm_epsilon: pydantic.PositiveFloat = 1e-6
    """Epsilon of the LayerNorm of the features."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights and queries."""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> "AttentionPoolingConnectorConfig":
        check_heads(self.kind, self.hidden_size, self.num_attention_heads)
        return self

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes, class token and all."""
        return self.num_tokens

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        width = self.hidden_size
        attended = count_attention(
            products.within("attention"),
            AttentionShape(shape.num_tiles, self.num_tokens, shape.num_patches, width, shape.input_size, width),
            asking=products.trains("queries"),
            read=products.norm("layernorm", needs_features),
        )
        return products.linear("projection", shape.num_tiles * self.num_tokens, width, shape.output_size, attended)

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "AttentionPoolingConnector":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, num_tokens, output_size]``.

        Raises:
            ValueError: it is asked for in FP8.
        """
        return AttentionPoolingConnector(self, input_size, output_size, megatron_settings, backend)


class AttentionPoolingConnector(MegatronModule):
    """Queries, attention and a linear layer, whole on every tensor-parallel rank."""

    def __init__(
        self,
        config: AttentionPoolingConnectorConfig,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
    ) -> None:
        transformer_config = replicated_config(config, megatron_settings, config.layernorm_epsilon)
        super().__init__(transformer_config)
        self.queries = learned(transformer_config, config.num_tokens, config.hidden_size)
        self.layernorm = layer_norm(transformer_config, backend, input_size)
        self.attention = Attention(transformer_config, config.hidden_size, input_size, config.num_attention_heads)
        self.projection = linear(transformer_config, config.hidden_size, output_size, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """Pool and project ``[T, P, D]`` -> ``[T, K, hidden]``."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self.projection(self.attention(queries, self.layernorm(features)))
