"""The layers that need nothing but torch and megatron-core, on CPUs and GPUs.

megatron-core's own tensor-parallel linear layers, torch's norms, and torch's fused attention.

Shape letters: S sequence, N rows of a batch, H heads (of this tensor-parallel rank), G key/value groups, D channels of
a head.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.models.backend.blocks import attend_in_blocks, takes_blocks
from megavlm.models.backend.spec import Backend
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

    Packed rows that train on a GPU go through FlexAttention, which skips the blocks that nobody sees.
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
        if attention_mask is not None and self.training and dropout == 0.0 and takes_blocks(query, attention_mask):
            return attend_in_blocks(query, key, value, attention_mask, self.softmax_scale)
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


TORCH = Backend(
    norm=Norm,
    column_parallel_linear=ColumnParallelLinear,
    row_parallel_linear=RowParallelLinear,
    core_attention=SDPACoreAttention,
)
