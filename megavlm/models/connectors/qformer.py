"""BLIP-2's Q-Former (arXiv 2301.12597), as ``transformers``' Blip2QFormerModel computes it, without dropout.

Learned queries go through BERT's layers and read the features in every second one; a linear layer takes them to the
language model's width. BLIP-2's first stage sends text through the same layers: :class:`QFormerLayer` has text's own
feed-forward layer on request, and takes queries and text in one sequence. Shape letters: T tiles, P features of a tile
(BLIP-2 keeps the class token), K queries, L queries and text, D width.
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


class QFormerConfig(Config):
    """A Q-Former and a linear layer. The defaults are BLIP-2's."""

    kind: Literal["qformer"] = "qformer"
    num_tokens: pydantic.PositiveInt = 32
    """Learned queries, which are the tokens of a tile."""
    num_layers: pydantic.PositiveInt = 12
    hidden_size: pydantic.PositiveInt = 768
    """Width of the queries and the layers."""
    ffn_hidden_size: pydantic.PositiveInt = 3072
    num_attention_heads: pydantic.PositiveInt = 12
    cross_attention_frequency: pydantic.PositiveInt = 2
    """Layers 0, 2, 4 ... read the features with 2."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-12
    """Epsilon of every LayerNorm."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights and queries."""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> "QFormerConfig":
        check_heads(self.kind, self.hidden_size, self.num_attention_heads)
        return self

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes, class token and all."""
        return self.num_tokens

    def has_cross_attention(self, layer: int) -> bool:
        """Whether a layer, counted from 0, reads the features."""
        return layer % self.cross_attention_frequency == 0

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        num_queries = shape.num_tiles * self.num_tokens
        queries = self.count_layers(products, shape, products.trains("queries"), needs_features)
        return products.linear("projection", num_queries, self.hidden_size, shape.output_size, queries)

    def count_layers(
        self, products: Products, shape: FeatureShape, needs_states: bool, needs_features: bool, *, num_text: int = 0
    ) -> bool:
        """Tell the matrix products of :meth:`QFormer.run_layers`.

        Args:
            products: takes them.
            shape: of the features.
            needs_states: whether the gradient of queries and text is needed.
            needs_features: whether the features' is.
            num_text: tokens of text behind the queries of a tile.

        Returns:
            Whether the gradient of the states that come out is needed.
        """
        num_tiles, width, length = shape.num_tiles, self.hidden_size, self.num_tokens + num_text
        among = AttentionShape(num_tiles, length, length, width, width, width)
        across = AttentionShape(num_tiles, self.num_tokens, shape.num_patches, width, shape.input_size, width)
        states = products.norm("layernorm", needs_states)
        for number in range(self.num_layers):
            layer = products.within(f"layers.{number}")
            states |= count_attention(layer.within("self_attention"), among, asking=states, read=states)
            queries = text = layer.norm("self_attention_norm", states)
            if self.has_cross_attention(number):
                queries |= count_attention(layer.within("cross_attention"), across, asking=queries, read=needs_features)
                queries = layer.norm("cross_attention_norm", queries)
            states = self._count_feed_forward(layer.within("query_ffn"), num_tiles * self.num_tokens, queries)
            if num_text:
                states |= self._count_feed_forward(layer.within("text_ffn"), num_tiles * num_text, text)
        return states

    def _count_feed_forward(self, products: Products, num_vectors: int, needs: bool) -> bool:
        inner = products.linear("up", num_vectors, self.hidden_size, self.ffn_hidden_size, needs)
        return products.norm(
            "norm", products.linear("down", num_vectors, self.ffn_hidden_size, self.hidden_size, inner) or needs
        )

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "QFormer":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, num_tokens, output_size]``.

        Raises:
            ValueError: it is asked for in FP8.
        """
        config = replicated_config(self, megatron_settings, self.layernorm_epsilon)
        return QFormer(self, config, input_size, output_size, backend)


class QFormer(MegatronModule):
    """Queries, layers and a linear layer, whole on every tensor-parallel rank."""

    def __init__(
        self,
        config: QFormerConfig,
        transformer_config: TransformerConfig,
        input_size: int,
        output_size: int | None,
        backend: Backend,
        *,
        has_text: bool = False,
    ) -> None:
        """Make the module.

        Args:
            config: of the connector.
            transformer_config: see :func:`megavlm.models.connectors.layers.replicated_config`.
            input_size: width of the features.
            output_size: width of the language model; None: there is none, and nothing behind the layers.
            backend: where the norms come from.
            has_text: whether the layers have a feed-forward layer for text.
        """
        super().__init__(transformer_config)
        self.queries = learned(transformer_config, config.num_tokens, config.hidden_size)
        self.layernorm = layer_norm(transformer_config, backend, config.hidden_size)
        self.layers = torch.nn.ModuleList(
            QFormerLayer(
                config,
                transformer_config,
                input_size if config.has_cross_attention(layer) else None,
                backend,
                has_text=has_text,
            )
            for layer in range(config.num_layers)
        )
        self.projection = None
        if output_size is not None:
            self.projection = linear(transformer_config, config.hidden_size, output_size, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """Read ``[T, P, D]`` -> ``[T, K, hidden]``."""
        assert self.projection is not None, "built without a language model"
        return self.projection(self.read(features))

    def read(self, features: Tensor) -> Tensor:
        """Return the queries after the last layer, ``[T, K, hidden_size]``."""
        return self.run_layers(self.queries.expand(features.shape[0], -1, -1), features)

    def run_layers(self, states: Tensor, features: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Normalise and run embedded queries and text through the layers.

        Args:
            states: ``[T, L, hidden_size]``: the K queries, text behind them; without features only text.
            features: ``[T, P, D]``, what the queries read; None: there are no queries.
            mask: ``[T or 1, 1, L, L]`` bool, True where one may not look; None: all see all.

        Returns:
            ``[T, L, hidden_size]``.
        """
        states = self.layernorm(states)
        num_queries = 0 if features is None else self.queries.shape[0]
        for layer in self.layers:
            states = layer(states, features, num_queries, mask)
        return states


class QFormerLayer(torch.nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward; each normalised behind its residual (post-norm)."""

    def __init__(
        self,
        config: QFormerConfig,
        transformer_config: TransformerConfig,
        input_size: int | None,
        backend: Backend,
        *,
        has_text: bool,
    ) -> None:
        """Make the layer; ``input_size`` is the features' width, None in a layer that does not read them."""
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.self_attention = Attention(transformer_config, width, width, heads)
        self.self_attention_norm = layer_norm(transformer_config, backend, width)
        self.cross_attention = self.cross_attention_norm = None
        if input_size is not None:
            self.cross_attention = Attention(transformer_config, width, input_size, heads)
            self.cross_attention_norm = layer_norm(transformer_config, backend, width)
        self.query_ffn = _FeedForward(config, transformer_config, backend)
        self.text_ffn = _FeedForward(config, transformer_config, backend) if has_text else None

    def forward(self, states: Tensor, features: Tensor | None, num_queries: int, mask: Tensor | None = None) -> Tensor:
        """Run the layer on ``[T, L, hidden_size]``, the first ``num_queries`` of which are queries."""
        states = self.self_attention_norm(states + self.self_attention(states, states, mask))
        queries, text = states[:, :num_queries], states[:, num_queries:]
        if num_queries and self.cross_attention is not None and self.cross_attention_norm is not None:
            queries = self.cross_attention_norm(queries + self.cross_attention(queries, features))
        if not text.shape[1]:
            return self.query_ffn(queries)
        assert self.text_ffn is not None, "built without has_text"
        text = self.text_ffn(text)
        return torch.cat((self.query_ffn(queries), text), dim=1) if num_queries else text


class _FeedForward(torch.nn.Module):
    """Two linear layers with GELU, a residual, and a norm behind it."""

    def __init__(self, config: QFormerConfig, transformer_config: TransformerConfig, backend: Backend) -> None:
        super().__init__()
        self.up = linear(transformer_config, config.hidden_size, config.ffn_hidden_size, bias=True)
        self.down = linear(transformer_config, config.ffn_hidden_size, config.hidden_size, bias=True)
        self.norm = layer_norm(transformer_config, backend, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(states + self.down(F.gelu(self.up(states))))
