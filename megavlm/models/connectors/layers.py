"""Layers of the connectors that every tensor-parallel rank holds whole.

The features of a tile are whole on each tensor-parallel rank, and so is the gradient of the tokens that a connector
makes of them: the ranks then compute the same gradient of every weight here, and nothing has to be reduced. Shape
letters: T tiles, K queries, P patches, D width, H heads.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.models.backend import Backend
from megavlm.models.connectors.products import Products
from megavlm.models.first_stage import first_stage_config
from megavlm.runtime import current_device


class ReplicatedConnector(Protocol):
    """What the config of a connector that is not split over ranks says."""

    @property
    def kind(self) -> str:
        """Its row in the dict of connectors."""

    @property
    def init_method_std(self) -> float:
        """Standard deviation of fresh weights."""


def replicated_config(
    connector: ReplicatedConnector, megatron_settings: Mapping[str, Any], layernorm_epsilon: float = 1e-5
) -> TransformerConfig:
    """Return megatron-core's config of a connector that is not split over ranks: precision and fresh weights.

    Raises:
        ValueError: the connector is asked for in FP8, which its layers do not have.
    """
    if megatron_settings.get("fp8") is not None:
        raise ValueError(
            f"engine.fp8.connector='fp8': the layers of model.connector.kind={connector.kind!r} have no FP8 (mlp, "
            "linear and shared_mlp have). Set it to bf16."
        )
    heads = megatron_settings.get("tensor_model_parallel_size", 1)
    return first_stage_config(
        megatron_settings,
        num_layers=1,
        # No layer is made by these numbers; megatron-core's config insists on a head for each rank.
        hidden_size=heads,
        ffn_hidden_size=heads,
        num_attention_heads=heads,
        normalization="LayerNorm",
        layernorm_epsilon=layernorm_epsilon,
        init_method_std=connector.init_method_std,
    )


def grid_side(kind: str, num_patches: int) -> int:
    """Return the side of a tile's square of patches.

    Raises:
        ValueError: the features are no square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"model.connector.kind={kind!r}: works on a square of patches, and model.vision gives {num_patches} "
            f"features a tile (nearest square: {side * side}). Set model.vision.keep_class_token to false, or change "
            "image_size."
        )
    return side


def token_side(kind: str, num_tokens: int, num_patches: int) -> int:
    """Return the side of the square of tokens that a square of patches is pooled to.

    Raises:
        ValueError: tokens or patches are no square, or the tokens are more than the patches.
    """
    grid_side(kind, num_patches)
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"model.connector.num_tokens={num_tokens}: kind {kind!r} gives a square of tokens. Choose "
            f"{side * side} or {(side + 1) ** 2}."
        )
    if num_tokens > num_patches:
        raise ValueError(
            f"model.connector.num_tokens={num_tokens}: kind {kind!r} pools, and model.vision gives only {num_patches} "
            "features a tile. Lower it."
        )
    return side


def check_heads(kind: str, width: int, num_heads: int) -> None:
    """Check that heads share a width evenly.

    Raises:
        ValueError: they do not.
    """
    if width % num_heads:
        raise ValueError(
            f"model.connector.num_attention_heads={num_heads}: kind {kind!r} shares a width of {width} between them, "
            "which it does not divide. Change one of them."
        )


def linear(config: TransformerConfig, input_size: int, output_size: int, *, bias: bool) -> torch.nn.Linear:
    """A linear layer, uninitialised as far as a run is concerned."""
    return torch.nn.Linear(input_size, output_size, bias=bias, device=current_device(), dtype=config.params_dtype)


def layer_norm(config: TransformerConfig, backend: Backend, width: int) -> torch.nn.Module:
    """A LayerNorm over the last dimension, of the config's epsilon."""
    return backend.norm(config=config, hidden_size=width, eps=config.layernorm_epsilon)


def learned(config: TransformerConfig, *shape: int) -> torch.nn.Parameter:
    """A learned tensor (queries, positions, an end token), uninitialised."""
    return torch.nn.Parameter(torch.empty(shape, device=current_device(), dtype=config.params_dtype))


class Attention(torch.nn.Module):
    """Multi-head attention with projections of its own for queries, keys, values and output."""

    def __init__(
        self,
        config: TransformerConfig,
        query_size: int,
        key_value_size: int,
        num_heads: int,
        *,
        kv_channels: int | None = None,
        bias: bool = True,
        head_norm: Backend | None = None,
    ) -> None:
        """Make the layer.

        Args:
            config: of the connector.
            query_size: width of what asks, and of the output.
            key_value_size: width of what is read.
            num_heads: H.
            kv_channels: channels of a head; None: ``query_size / num_heads``.
            bias: of all four projections.
            head_norm: where LayerNorms of each head's queries and keys come from; None: there are none.
        """
        super().__init__()
        self.num_heads = num_heads
        channels = kv_channels or query_size // num_heads
        width = num_heads * channels
        self.query = linear(config, query_size, width, bias=bias)
        self.key = linear(config, key_value_size, width, bias=bias)
        self.value = linear(config, key_value_size, width, bias=bias)
        self.output = linear(config, width, query_size, bias=bias)
        self.query_norm = self.key_norm = None
        if head_norm is not None:
            self.query_norm = layer_norm(config, head_norm, channels)
            self.key_norm = layer_norm(config, head_norm, channels)

    def forward(self, asking: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            asking: ``[T, K, query_size]``.
            read: ``[T, P, key_value_size]``.
            mask: ``[T or 1, 1, K, P]`` bool, True where one may not look; None: everything is seen.

        Returns:
            ``[T, K, query_size]``.
        """
        queries, keys, values = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.query, asking), (self.key, read), (self.value, read))
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=None if mask is None else ~mask)
        return self.output(attended.transpose(1, 2).flatten(2))


class AttentionShape(NamedTuple):
    """What an :class:`Attention` is given, and its widths."""

    num_rows: int
    """Sequences."""
    num_asking: int
    """K, of a row."""
    num_read: int
    """P, of a row."""
    query_size: int
    key_value_size: int
    width: int
    """Channels of all heads."""


def count_attention(
    products: Products,
    shape: AttentionShape,
    *,
    asking: bool,
    read: bool,
    bias: bool = True,
    head_norm: bool = False,
) -> bool:
    """Tell the matrix products of an :class:`Attention`.

    Args:
        products: takes them.
        shape: of what goes in.
        asking, read: whether its gradients are needed.
        bias, head_norm: whether the layer has them.

    Returns:
        Whether the output's gradient is needed.
    """
    num_asking, num_read = shape.num_rows * shape.num_asking, shape.num_rows * shape.num_read
    query = products.linear("query", num_asking, shape.query_size, shape.width, asking, bias=bias)
    key = products.linear("key", num_read, shape.key_value_size, shape.width, read, bias=bias)
    value = products.linear("value", num_read, shape.key_value_size, shape.width, read, bias=bias)
    if head_norm:
        query, key = products.norm("query_norm", query), products.norm("key_norm", key)
    attended = products.attention(num_asking * shape.num_read, shape.width, query=query, key=key, value=value)
    return products.linear("output", num_asking, shape.width, shape.query_size, attended, bias=bias)
