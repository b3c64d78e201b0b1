"""What an implementation of layers consists of, and megatron-core's layer specs made of it.

Vision encoders and language models both ask this module for their layers, so that they do not know which
implementation they get.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

_NORM_OF_ATTENTION = {"self_attention.linear_qkv.layer_norm_": "input_layernorm."}
_NORM_OF_FEED_FORWARD = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


@dataclass(frozen=True)
class Backend:
    """The layer classes of one implementation, in the signatures that megatron-core builds them by."""

    norm: Any
    column_parallel_linear: Any
    row_parallel_linear: Any
    core_attention: Any
    self_attention: Any = SelfAttention
    norm_column_parallel_linear: Any = None
    """A column-parallel linear layer that normalises its input first, in one kernel; None: there is none. Its norm
    keeps the checkpoint key of a norm that stands alone."""
    quantized_experts: ModuleSpec | None = None
    """Experts whose products can be FP8; None: there are none."""
    emulating: "Callable[[Mapping[str, Any]], Backend] | None" = None
    """Makes, of TransformerConfig arguments, the layers of the parts that shall emulate FP8, where megatron-core runs a
    bfloat16 model; None: FP8 is megatron-core's affair."""

    @property
    def unquantized(self) -> "Backend":
        """The same with linear layers that stay in bfloat16 inside a decoder that computes in FP8."""
        return dataclasses.replace(
            self,
            column_parallel_linear=ColumnParallelLinear,
            row_parallel_linear=RowParallelLinear,
            norm_column_parallel_linear=None,
            quantized_experts=None,
        )


def attention_spec(
    backend: Backend,
    attn_mask_type: AttnMaskType,
    *,
    qk_norm: ModuleSpec | type[torch.nn.Module] = IdentityOp,
    qkv_bias: bool | None = None,
) -> ModuleSpec:
    """Self-attention, with the norm before it where the implementation has both in one kernel.

    Args:
        backend: where the layers come from.
        attn_mask_type: ``causal`` for a decoder, ``no_mask`` for a vision encoder (megatron-core's own vision spec says
            causal, which trains a vision encoder that sees half of the image).
        qk_norm: norm of queries and keys; built with ``hidden_size`` = channels of a head, called on ``[S, N, H, D]``.
        qkv_bias: overrides the bias that the transformer config asks for.
    """
    linear_qkv: Any = backend.norm_column_parallel_linear or backend.column_parallel_linear
    if qkv_bias is not None:
        linear_qkv = functools.partial(_linear_with_bias, linear_qkv, qkv_bias)
    return ModuleSpec(
        module=backend.self_attention,
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
    linear_fc1 = backend.norm_column_parallel_linear or backend.column_parallel_linear
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=backend.row_parallel_linear)
    )


def layer_spec(
    backend: Backend,
    self_attention: ModuleSpec,
    *,
    mlp: ModuleSpec | None = None,
    residual: Any = get_bias_dropout_add,
) -> ModuleSpec:
    """One pre-norm transformer layer. Checkpoint keys do not tell which implementation it is of.

    Args:
        backend: where the layers come from.
        self_attention: see :func:`attention_spec`.
        mlp: the feed-forward layer, which does not normalise its input; :func:`mlp_spec` by default.
        residual: what adds a branch to the residual stream (a layer-scale module for some vision encoders).
    """
    fuses = backend.norm_column_parallel_linear is not None
    # a feed-forward layer of its own kind (experts) wants its input normalised
    fuses_feed_forward = fuses and mlp is None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fuses else backend.norm,
            self_attention=self_attention,
            self_attn_bda=residual,
            pre_mlp_layernorm=IdentityOp if fuses_feed_forward else backend.norm,
            mlp=mlp or mlp_spec(backend),
            mlp_bda=residual,
            sharded_state_dict_keys_map=(_NORM_OF_ATTENTION if fuses else {})
            | (_NORM_OF_FEED_FORWARD if fuses_feed_forward else {}),
        ),
    )


def block_spec(backend: Backend, layers: list[ModuleSpec]) -> TransformerBlockSubmodules:
    """A stack of layers with this backend's norm at its end."""
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.norm)


def _linear_with_bias(linear: type[torch.nn.Module], forced_bias: bool, *args: Any, **kwargs: Any) -> torch.nn.Module:
    return linear(*args, **{**kwargs, "bias": forced_bias})
