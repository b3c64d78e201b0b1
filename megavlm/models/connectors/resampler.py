"""The Perceiver resampler of Flamingo (arXiv 2204.14198), as ``transformers``' IdeficsPerceiverResampler computes it.

Learned latents attend to the features and to themselves, layer by layer. Flamingo's learned time embeddings belong to
the frames of a video and are left out; it has no positions of patches. A linear layer takes the latents to the language
model's width. Shape letters: T tiles, P features of a tile, K latents, D width.
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
    count_attention,
    layer_norm,
    learned,
    linear,
    replicated_config,
)
from megavlm.models.connectors.products import FeatureShape, Products


class ResamplerConfig(Config):
    """A Perceiver resampler of the vision features' width. The defaults are Flamingo's."""

    kind: Literal["resampler"] = "resampler"
    num_tokens: pydantic.PositiveInt = 64
    """Learned latents, which are the tokens of a tile."""
    num_layers: pydantic.PositiveInt = 6
    num_attention_heads: pydantic.PositiveInt = 16
    kv_channels: pydantic.PositiveInt = 96
    """Channels of a head."""
    ffn_hidden_size: pydantic.PositiveInt | None = None
    """Width inside the feed-forward layers; None: four times the features'."""
    activation: Literal["squared_relu", "relu"] = "squared_relu"
    """Of the feed-forward layers (Flamingo: squared_relu, Idefics: relu)."""
    qk_layernorm: bool = False
    """LayerNorm of each head's queries and keys (Idefics: yes)."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-5
    """Epsilon of every LayerNorm."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights and latents."""

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes, class token and all."""
        return self.num_tokens

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        width, num_latents = shape.input_size, shape.num_tiles * self.num_tokens
        heads, inner = self.num_attention_heads * self.kv_channels, self.ffn_hidden_size or 4 * shape.input_size
        num_read = shape.num_patches + self.num_tokens
        attention = AttentionShape(shape.num_tiles, self.num_tokens, num_read, width, width, heads)
        latents = products.trains("latents")
        for number in range(self.num_layers):
            layer = products.within(f"layers.{number}")
            features, normed = layer.norm("feature_norm", needs_features), layer.norm("latent_norm", latents)
            latents |= count_attention(
                layer.within("attention"),
                attention,
                asking=normed,
                read=features or normed,
                bias=False,
                head_norm=self.qk_layernorm,
            )
            activated = layer.linear("up", num_latents, width, inner, layer.norm("ffn_norm", latents), bias=False)
            latents |= layer.linear("down", num_latents, inner, width, activated, bias=False)
        latents = products.norm("layernorm", latents)
        return products.linear("projection", num_latents, width, shape.output_size, latents, bias=False)

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "Resampler":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, num_tokens, output_size]``.

        Raises:
            ValueError: it is asked for in FP8.
        """
        config = replicated_config(self, megatron_settings, self.layernorm_epsilon)
        return Resampler(self, config, input_size, output_size, backend)


class Resampler(MegatronModule):
    """Latents, layers, a norm and a linear layer, whole on every tensor-parallel rank."""

    def __init__(
        self,
        config: ResamplerConfig,
        transformer_config: TransformerConfig,
        input_size: int,
        output_size: int,
        backend: Backend,
    ) -> None:
        super().__init__(transformer_config)
        self.latents = learned(transformer_config, config.num_tokens, input_size)
        self.layers = torch.nn.ModuleList(
            _Layer(config, transformer_config, input_size, backend) for _ in range(config.num_layers)
        )
        self.layernorm = layer_norm(transformer_config, backend, input_size)
        self.projection = linear(transformer_config, input_size, output_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Resample ``[T, P, D]`` -> ``[T, K, hidden]``."""
        return self.projection(self.resample(features))

    def resample(self, features: Tensor) -> Tensor:
        """Return the latents after the last layer and the norm, ``[T, K, D]``."""
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.layernorm(latents)


class _Layer(torch.nn.Module):
    def __init__(
        self, config: ResamplerConfig, transformer_config: TransformerConfig, width: int, backend: Backend
    ) -> None:
        super().__init__()
        inner = config.ffn_hidden_size or 4 * width
        self.is_squared = config.activation == "squared_relu"
        self.feature_norm = layer_norm(transformer_config, backend, width)
        self.latent_norm = layer_norm(transformer_config, backend, width)
        self.attention = Attention(
            transformer_config,
            width,
            width,
            config.num_attention_heads,
            kv_channels=config.kv_channels,
            bias=False,
            head_norm=backend if config.qk_layernorm else None,
        )
        self.ffn_norm = layer_norm(transformer_config, backend, width)
        self.up = linear(transformer_config, width, inner, bias=False)
        self.down = linear(transformer_config, inner, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """``[T, K, D]`` and ``[T, P, D]`` -> ``[T, K, D]``."""
        normed = self.latent_norm(latents)
        latents = latents + self.attention(normed, torch.cat((self.feature_norm(features), normed), dim=1))
        activated = F.relu(self.up(self.ffn_norm(latents)))
        return latents + self.down(activated.square() if self.is_squared else activated)
