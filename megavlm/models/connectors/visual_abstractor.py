"""mPLUG-Owl's visual abstractor (arXiv 2304.14178 and its code): queries that read the features and each other.

Each layer normalises its queries, lets them attend to themselves and the normalised features together, and adds the
answer to the *normalised* queries; then a gated feed-forward layer with a norm inside. A linear layer takes the queries
to the language model's width and a learned token ends the tile. Shape letters: T tiles, P features of a tile (the class
token is kept), K queries, D width.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
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


class VisualAbstractorConfig(Config):
    """A visual abstractor of the vision features' width. The defaults are mPLUG-Owl's."""

    kind: Literal["visual_abstractor"] = "visual_abstractor"
    num_queries: pydantic.PositiveInt = 64
    """Learned queries."""
    end_token: bool = True
    """A learned token behind the queries' (mPLUG-Owl: 65 tokens a tile)."""
    num_layers: pydantic.PositiveInt = 6
    ffn_hidden_size: pydantic.PositiveInt = 4096
    """Width inside the gated feed-forward layers."""
    num_attention_heads: pydantic.PositiveInt = 16
    layernorm_epsilon: pydantic.PositiveFloat = 1e-6
    """Epsilon of every LayerNorm."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights, queries and end token."""

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes, end token and all."""
        return self.num_queries + self.end_token

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        width, num_queries = shape.input_size, shape.num_tiles * self.num_queries
        num_read, inner = shape.num_patches + self.num_queries, self.ffn_hidden_size
        attention = AttentionShape(shape.num_tiles, self.num_queries, num_read, width, width, width)
        queries = products.trains("queries")
        for number in range(self.num_layers):
            layer = products.within(f"layers.{number}")
            queries = layer.norm("query_norm", queries)
            read = layer.norm("feature_norm", needs_features) or queries
            queries |= count_attention(layer.within("attention"), attention, asking=queries, read=read)
            normed = layer.norm("ffn_norm", queries)
            gate, up = (layer.linear(name, num_queries, width, inner, normed) for name in ("gate", "up"))
            queries |= layer.linear("down", num_queries, inner, width, layer.norm("inner_norm", gate or up))
        tokens = products.linear("projection", num_queries, width, shape.output_size, queries)
        return tokens or (self.end_token and products.trains("end_token"))

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "VisualAbstractor":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, K, output_size]``.

        Raises:
            ValueError: the heads do not divide the features' width, or it is asked for in FP8.
        """
        check_heads(self.kind, input_size, self.num_attention_heads)
        config = replicated_config(self, megatron_settings, self.layernorm_epsilon)
        return VisualAbstractor(self, config, input_size, output_size, backend)


class VisualAbstractor(MegatronModule):
    """Queries, layers, a linear layer and the end token, whole on every tensor-parallel rank."""

    def __init__(
        self,
        config: VisualAbstractorConfig,
        transformer_config: TransformerConfig,
        input_size: int,
        output_size: int,
        backend: Backend,
    ) -> None:
        super().__init__(transformer_config)
        self.queries = learned(transformer_config, config.num_queries, input_size)
        self.layers = torch.nn.ModuleList(
            _Layer(config, transformer_config, input_size, backend) for _ in range(config.num_layers)
        )
        self.projection = linear(transformer_config, input_size, output_size, bias=True)
        self.end_token = learned(transformer_config, output_size) if config.end_token else None

    def forward(self, features: Tensor) -> Tensor:
        """Abstract ``[T, P, D]`` -> ``[T, K, hidden]``, the end token last."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        tokens = self.projection(queries)
        if self.end_token is None:
            return tokens
        return torch.cat((tokens, self.end_token.expand(tokens.shape[0], 1, -1)), dim=1)


class _Layer(torch.nn.Module):
    def __init__(
        self, config: VisualAbstractorConfig, transformer_config: TransformerConfig, width: int, backend: Backend
    ) -> None:
        super().__init__()
        inner = config.ffn_hidden_size
        self.query_norm = layer_norm(transformer_config, backend, width)
        self.feature_norm = layer_norm(transformer_config, backend, width)
        self.attention = Attention(transformer_config, width, width, config.num_attention_heads)
        self.ffn_norm = layer_norm(transformer_config, backend, width)
        self.gate = linear(transformer_config, width, inner, bias=True)
        self.up = linear(transformer_config, width, inner, bias=True)
        self.inner_norm = layer_norm(transformer_config, backend, inner)
        self.down = linear(transformer_config, inner, width, bias=True)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """``[T, queries, D]`` and ``[T, P, D]`` -> ``[T, queries, D]``."""
        queries = self.query_norm(queries)
        read = torch.cat((queries, self.feature_norm(features)), dim=1)
        queries = queries + self.attention(queries, read)
        normed = self.ffn_norm(queries)
        return queries + self.down(self.inner_norm(F.silu(self.gate(normed)) * self.up(normed)))
