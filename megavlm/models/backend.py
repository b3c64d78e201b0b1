"""Which implementation of layers a model is built from, as megatron-core layer specs.

``torch`` is the only kind here: megatron-core's own tensor-parallel linear layers, torch's norms, and torch's fused
scaled-dot-product attention as core attention. Vision encoders and language models both ask this module for their
layers, so that a second implementation touches one file.

Shape letters: S sequence, N rows of a batch, H heads (of this tensor-parallel rank), G key/value groups, D channels of
a head.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megavlm.models.kernels import rms_norm, short_attention, takes_short_attention
from megavlm.models.weights import start_at


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm, by ``config.normalization``.

    megatron-core's torch norm refuses sequence parallelism because its weights would miss the all-reduce of their
    gradients over the tensor-parallel ranks. This one marks its weights, which is all that the all-reduce needs.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.normalized_shape = (hidden_size,)
        self.eps = eps
        ones, zeros = torch.ones(hidden_size), torch.zeros(hidden_size)
        self.weight = start_at(torch.nn.Parameter(ones.to(config.params_dtype)), 1.0)
        has_bias = config.normalization == "LayerNorm"
        self.bias = torch.nn.Parameter(zeros.to(config.params_dtype)) if has_bias else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension of ``[..., hidden_size]``."""
        if self.bias is None:
            if hidden_states.device.type == "cpu":
                return rms_norm(hidden_states, self.weight, self.eps)
            return F.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)
        return F.layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)


class SDPACoreAttention(torch.nn.Module):
    """Core attention through ``torch.nn.functional.scaled_dot_product_attention``: no materialised scores.

    ``attention_mask`` follows megatron-core: True means *may not see*. Without a mask, ``attn_mask_type`` decides
    between causal and full attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,  # other megatron-core versions pass more (cp_comm_type, pg_collection, model_comm_pgs, name)
    ) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(
                f"engine.context_parallel_size={config.context_parallel_size}: the torch backend's attention holds "
                "whole sequences. Use 1."
            )
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[S, N, H, D]``.
            key, value: ``[S_kv, N, G, D]`` with H a multiple of G.
            attention_mask: ``[N or 1, 1, S, S_kv]`` bool, True where a token may not look, or None.
            attn_mask_type: overrides the layer's own type.
            attention_bias, packed_seq_params: must be None; packed rows come as a mask.

        Returns:
            ``[S, N, H * D]``.
        """
        assert attention_bias is None, "a bias would go into the mask"
        assert packed_seq_params is None, "packed rows come as an attention mask"
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        is_causal = attention_mask is None and mask_type == AttnMaskType.causal and query.shape[0] == key.shape[0]
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 and takes_short_attention(query, key):
            scale = self.softmax_scale or query.shape[-1] ** -0.5
            return short_attention(query, key, value, mask=attention_mask, is_causal=is_causal, scale=scale)
        with self._dropout_stream(dropout):
            attended = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                is_causal=is_causal,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _dropout_stream(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        """Heads differ between tensor-parallel ranks, so their dropout draws from the per-rank random stream."""
        if dropout == 0.0:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


@dataclass(frozen=True)
class Backend:
    """The layer classes of one implementation, in the signatures that megatron-core builds them by."""

    norm: type[torch.nn.Module]
    column_parallel_linear: type[torch.nn.Module]
    row_parallel_linear: type[torch.nn.Module]
    core_attention: type[torch.nn.Module]


BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        norm=Norm,
        column_parallel_linear=ColumnParallelLinear,
        row_parallel_linear=RowParallelLinear,
        core_attention=SDPACoreAttention,
    ),
}


def attention_spec(
    backend: Backend,
    attn_mask_type: AttnMaskType,
    *,
    qk_norm: ModuleSpec | type[torch.nn.Module] = IdentityOp,
    qkv_bias: bool | None = None,
) -> ModuleSpec:
    """Self-attention.

    Args:
        backend: where the layers come from.
        attn_mask_type: ``causal`` for a decoder, ``no_mask`` for a vision encoder (megatron-core's own vision spec says
            causal, which trains a vision encoder that sees half of the image).
        qk_norm: norm of queries and keys; built with ``hidden_size`` = channels of a head, called on ``[S, N, H, D]``.
        qkv_bias: overrides the bias that the transformer config asks for.
    """
    linear_qkv: Any = backend.column_parallel_linear
    if qkv_bias is not None:
        linear_qkv = functools.partial(_linear_with_bias, linear_qkv, qkv_bias)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": attn_mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=backend.core_attention,
            linear_proj=backend.row_parallel_linear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def mlp_spec(backend: Backend) -> ModuleSpec:
    """Feed-forward layer: gated or not, by the transformer config."""
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear),
    )


def layer_spec(
    backend: Backend,
    self_attention: ModuleSpec,
    *,
    mlp: ModuleSpec | None = None,
    residual: Any = get_bias_dropout_add,
) -> ModuleSpec:
    """One pre-norm transformer layer.

    Args:
        backend: where the layers come from.
        self_attention: see :func:`attention_spec`.
        mlp: the feed-forward layer; :func:`mlp_spec` by default.
        residual: what adds a branch to the residual stream (a layer-scale module for some vision encoders).
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm,
            self_attention=self_attention,
            self_attn_bda=residual,
            pre_mlp_layernorm=backend.norm,
            mlp=mlp or mlp_spec(backend),
            mlp_bda=residual,
        ),
    )


def block_spec(backend: Backend, layers: list[ModuleSpec]) -> TransformerBlockSubmodules:
    """A stack of layers with this backend's norm at its end."""
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.norm)


def _linear_with_bias(linear: type[torch.nn.Module], forced_bias: bool, *args: Any, **kwargs: Any) -> torch.nn.Module:
    return linear(*args, **{**kwargs, "bias": forced_bias})
