"""Gated cross-attention of tokens to the context of their row, as submodules of megatron-core's TransformerLayer.

Order in a layer, as in NVLM (arXiv 2409.11402, figure 3): self-attention, gated cross-attention, feed-forward. The
gate is Flamingo's (arXiv 2204.14198): tanh of a scalar that normally starts at zero, so that a fresh layer changes
nothing. Keys carry no positions. Flamingo's own order is that of :mod:`megavlm.models.gated_block`.

Shape letters: S tokens, N rows, C tokens of a row's context, H heads (of this tensor-parallel rank), G key/value
groups, D channels of a head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import Attention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megavlm.models.backend import Backend, SDPACoreAttention, compiled_flex_attention
from megavlm.models.cache import KeyValueCache
from megavlm.models.weights import start_at
from megavlm.runtime import current_device


def with_cross_attention(layer: ModuleSpec, backend: Backend, *, gate_init: float) -> ModuleSpec:
    """Return a decoder layer's spec with gated cross-attention (and a norm of its own) before the feed-forward layer.

    Args:
        layer: of a megatron-core ``TransformerLayer``.
        backend: where norm and linear layers come from.
        gate_init: value of a fresh gate.
    """
    cross_attention = ModuleSpec(
        module=CrossAttention,
        submodules=CrossAttentionSubmodules(
            linear_q=backend.column_parallel_linear,  # type: ignore[arg-type]
            linear_kv=backend.column_parallel_linear,  # type: ignore[arg-type]
            core_attention=RangeAttention,
            linear_proj=backend.row_parallel_linear,
        ),
    )
    submodules = dataclasses.replace(
        layer.submodules,
        pre_cross_attn_layernorm=backend.norm,
        cross_attention=cross_attention,
        cross_attn_bda=ModuleSpec(module=GatedResidual, params={"gate_init": gate_init}),
    )
    return dataclasses.replace(layer, submodules=submodules)


class CrossAttention(Attention):
    """Queries from the tokens, keys and values from the context, with grouped heads.

    megatron-core's own ``CrossAttention`` refuses grouped heads. Under sequence parallelism ``linear_kv`` gathers the
    context, as ``linear_q`` gathers the tokens.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_q = self._column_parallel(submodules.linear_q, self.query_projection_size)
        self.linear_kv = self._column_parallel(submodules.linear_kv, 2 * self.kv_projection_size)

    def _column_parallel(self, linear: Callable[..., torch.nn.Module], output_size: int) -> torch.nn.Module:
        return linear(
            self.config.hidden_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | tuple[Tensor, Tensor] | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project ``[S, N, hidden]`` and ``[C, N, hidden]``: query ``[S, N, H, D]``, key, value ``[C, N, G, D]``.

        A pair of key and value that was kept is taken as it is.
        """
        assert key_value_states is not None, "the layer was called without a context"
        assert split_qkv
        assert not output_gate
        channels = self.hidden_size_per_attention_head
        query, _ = self.linear_q(hidden_states)
        if isinstance(key_value_states, tuple):
            key, value = key_value_states
        else:
            key, value = self._key_and_value(key_value_states)
        return query.unflatten(-1, (-1, channels)), key, value

    def _key_and_value(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``[C, N, hidden]`` -> two of ``[C, N, G, D]``."""
        mixed, _ = self.linear_kv(context)
        # a group's key and value stand side by side, so that any tensor-parallel size cuts between groups
        key, value = mixed.unflatten(-1, (-1, 2, self.hidden_size_per_attention_head)).unbind(-2)
        return key, value

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        key_value_states: Tensor | None,
        inference_context: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``[S, N, hidden]``, split over the sequence under sequence parallelism.
            attention_mask: ``[N, S, 2]`` int64: the range of the context that each token may see.
            key_value_states: ``[C, N, hidden]``, split over the sequence under sequence parallelism; not read where the
                cache holds what was made of it.
            inference_context: the cache in generation; the context's keys and values are kept in it.

        Returns:
            ``[S, N, hidden]``, exactly zero for tokens that see nothing, and no bias.
        """
        source: Any = key_value_states
        if inference_context is not None:
            if self.layer_number not in inference_context.context:
                inference_context.context[self.layer_number] = self._key_and_value(source)
            source = inference_context.context[self.layer_number]
        return super().forward(hidden_states, attention_mask, key_value_states=source)


class RangeAttention(SDPACoreAttention):
    """Core attention in which each query sees one range of the keys, and one with an empty range gets zero.

    On CUDA the ranges become FlexAttention's block mask: no mask of tokens by context is held, and blocks that nobody
    sees cost nothing. Elsewhere each row has a mask of its tokens by its own context.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[S, N, H, D]``.
            key, value: ``[C, N, G, D]`` with H a multiple of G.
            attention_mask: ``[N, S, 2]`` int64: half-open ranges of the keys.
            attn_mask_type: no meaning here.
            attention_bias, packed_seq_params: must be None.

        Returns:
            ``[S, N, H * D]``.
        """
        assert attention_bias is None
        assert packed_seq_params is None
        dropout = self.dropout if self.training else 0.0
        if query.device.type == "cuda" and dropout == 0.0:
            attended = self._attend_in_blocks(query, key, value, attention_mask)
        else:
            hidden = range_mask(attention_mask, key.shape[0])
            attended = super().forward(query, key, value, hidden, attn_mask_type=AttnMaskType.no_mask)
        sees_nothing = attention_mask[..., 0] >= attention_mask[..., 1]
        return attended.masked_fill(sees_nothing.t().unsqueeze(-1), 0.0)

    def _attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor, ranges: Tensor) -> Tensor:
        attended = compiled_flex_attention()(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            block_mask=_BLOCK_MASKS.get(ranges, key.shape[0]),
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.permute(2, 0, 1, 3).flatten(2)


def range_mask(ranges: Tensor, context_length: int) -> Tensor:
    """Turn ranges into megatron-core's kind of mask.

    Args:
        ranges: ``[N, S, 2]`` int64.
        context_length: C.

    Returns:
        ``[N, 1, S, C]`` bool, True where a token may not look. A token that sees nothing is let look at the first
        positions, because a softmax over nothing has no value; the caller takes its result away.
    """
    positions = torch.arange(context_length, device=ranges.device)
    starts, stops = ranges[..., :1], ranges[..., 1:]
    starts = starts.masked_fill(starts >= stops, 0)
    stops = stops.clamp(min=1)
    return ((positions < starts) | (positions >= stops)).unsqueeze(1)


class _BlockMasks:
    """Keeps the newest block mask: all layers of a micro-batch ask for the same one, in recomputation too."""

    def __init__(self) -> None:
        self._ranges: Tensor | None = None
        self._mask: BlockMask | None = None

    def get(self, ranges: Tensor, context_length: int) -> BlockMask:
        """Return the block mask of ``[N, S, 2]`` ranges over a context of ``context_length``."""
        kept = self._ranges
        # recomputation passes another view of the same memory, which is not used anew while this one is kept
        is_kept = kept is not None and kept.data_ptr() == ranges.data_ptr() and kept.shape == ranges.shape
        if self._mask is None or not is_kept:
            self._ranges, self._mask = ranges, range_block_mask(ranges, context_length)
        return self._mask


_BLOCK_MASKS = _BlockMasks()


def range_block_mask(ranges: Tensor, context_length: int, block_size: int = 128) -> BlockMask:
    """Turn ranges into FlexAttention's block mask, without a mask of tokens by context on the way.

    A block of tokens visits the blocks of context from the first to the last that any of its tokens sees; inside them
    each token keeps to its range.

    Args:
        ranges: ``[N, S, 2]`` int64; nothing is seen where one is empty.
        context_length: C.
        block_size: tokens, and context, of a block.
    """
    starts, stops = (bound.contiguous() for bound in ranges.unbind(-1))
    row_length = starts.shape[1]
    num_blocks = -(-context_length // block_size)
    is_empty = starts >= stops
    padding = (0, -row_length % block_size)
    first = F.pad(starts.masked_fill(is_empty, context_length), padding, value=context_length)
    after_last = F.pad(stops.masked_fill(is_empty, 0), padding)
    first_block = first.unflatten(1, (-1, block_size)).amin(-1) // block_size
    after_last_block = (after_last.unflatten(1, (-1, block_size)).amax(-1) + block_size - 1) // block_size
    visited = (first_block.unsqueeze(-1) + torch.arange(num_blocks, device=ranges.device)) % num_blocks

    def sees(row: Tensor, head: Tensor, token: Tensor, position: Tensor) -> Tensor:
        return (position >= starts[row, token]) & (position < stops[row, token])

    return BlockMask.from_kv_blocks(
        (after_last_block - first_block).clamp(min=0).unsqueeze(1).to(torch.int32),
        visited.unsqueeze(1).to(torch.int32),
        BLOCK_SIZE=block_size,
        mask_mod=sees,
        seq_lengths=(row_length, context_length),
    )


class GatedResidual(torch.nn.Module):
    """Adds a branch to the residual stream times the tanh of a learned scalar.

    Stands where megatron-core has its bias-dropout-add, and is called the same way.
    """

    def __init__(self, config: TransformerConfig, gate_init: float) -> None:
        super().__init__()
        gate = torch.full((1,), gate_init, dtype=config.params_dtype, device=current_device())
        self.gate = start_at(torch.nn.Parameter(gate), gate_init)
        self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return what adds ``(branch, bias)`` to a residual: ``[S, N, hidden]`` each, bias None."""

        def add(branch_and_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
            branch, _ = branch_and_bias
            return torch.addcmul(residual, F.dropout(branch, dropout, training), torch.tanh(self.gate))

        return add
