"""Transformer Engine's layers: fused norm and linear, fused attention, FP8.

megatron-core wraps them; here the wraps become what the rest of the project builds: the same arguments, the same
checkpoint keys, the same masks as the torch layers. Nothing here is used, or built, where another backend is chosen.

Shape letters: S sequence, N rows of a batch, H heads (of this tensor-parallel rank), G key/value groups, D channels of
a head.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.models.backend.spec import Backend
from megavlm.models.backend.torch import SDPACoreAttention
from megavlm.models.weights import start_at

_FUSED_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Wraps:
    """megatron-core's wraps of Transformer Engine's layers."""

    norm: Any
    column_parallel_linear: Any
    norm_column_parallel_linear: Any
    row_parallel_linear: Any
    core_attention: Any
    column_parallel_grouped_linear: Any
    row_parallel_grouped_linear: Any


def installed_wraps() -> Wraps | None:
    """megatron-core's wraps; None where there is no GPU or Transformer Engine cannot be imported."""
    if not (megatron_te.HAVE_TE and torch.cuda.is_available()):
        return None
    return Wraps(
        norm=megatron_te.TENorm,
        column_parallel_linear=megatron_te.TEColumnParallelLinear,
        norm_column_parallel_linear=megatron_te.TELayerNormColumnParallelLinear,
        row_parallel_linear=megatron_te.TERowParallelLinear,
        core_attention=megatron_te.TEDotProductAttention,
        column_parallel_grouped_linear=megatron_te.TEColumnParallelGroupedLinear,
        row_parallel_grouped_linear=megatron_te.TERowParallelGroupedLinear,
    )


def build_backend(wraps: Wraps) -> Backend:
    """Make the backend of these layers."""
    experts = None
    if wraps.column_parallel_grouped_linear is not None:
        experts = ModuleSpec(
            module=TEGroupedMLP,
            submodules=MLPSubmodules(
                linear_fc1=_subclass(_GroupedLinear, wraps.column_parallel_grouped_linear),
                linear_fc2=_subclass(_GroupedLinear, wraps.row_parallel_grouped_linear),
            ),
        )
    return Backend(
        norm=type("Norm", (_Norm,), {"wrap": wraps.norm, "__doc__": _Norm.__doc__}),
        column_parallel_linear=_subclass(_ColumnParallelLinear, wraps.column_parallel_linear),
        row_parallel_linear=_subclass(_RowParallelLinear, wraps.row_parallel_linear),
        core_attention=_subclass(_CoreAttention, wraps.core_attention),
        self_attention=RotarySelfAttention,
        norm_column_parallel_linear=_subclass(_NormColumnParallelLinear, wraps.norm_column_parallel_linear),
        quantized_experts=experts,
    )


def _subclass(changes: type, wrap: type) -> type:
    """The wrap with our changes before it. A class of its own, because without the package there is nothing to derive
    from when this module is imported."""
    return type(changes.__name__.lstrip("_"), (changes, wrap), {"__doc__": changes.__doc__})


class _NoExtraState:
    """Keeps nothing beside weights in checkpoints, as megatron-core's own layers do.

    Transformer Engine would pickle FP8 scales there, and unpickle whatever a checkpoint holds. Only delayed scaling has
    such a state; its history of maxima begins anew when a run is resumed.
    """

    def get_extra_state(self) -> None:
        """Nothing."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore what a checkpoint holds."""


class _ColumnParallelLinear(_NoExtraState):
    """Column-parallel linear layer that can gather its output, which Transformer Engine's cannot."""

    def __init__(self, *sizes: int, gather_output: bool = False, **kwargs: Any) -> None:
        self.gathers = gather_output
        defaults = {"skip_bias_add": False, "is_expert": False}
        super().__init__(*sizes, gather_output=False, **{**defaults, **kwargs})  # type: ignore[call-arg]

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[..., in]`` -> ``[..., out / tp]``, or whole where it gathers, and the bias if that is not added."""
        output, bias = super().forward(states)  # type: ignore[misc]
        if self.gathers:
            output = tensor_parallel.gather_from_tensor_model_parallel_region(output)
        return output, bias


class _RowParallelLinear(_NoExtraState):
    """Row-parallel linear layer with the torch layer's defaults."""

    def __init__(self, *sizes: int, **kwargs: Any) -> None:
        super().__init__(*sizes, **{"is_expert": False, **kwargs})  # type: ignore[call-arg]


class _NormColumnParallelLinear(_NoExtraState):
    """Norm and column-parallel linear layer in one. A fresh norm's weight is one."""

    layer_norm_weight: torch.nn.Parameter

    def __init__(self, *sizes: int, **kwargs: Any) -> None:
        super().__init__(*sizes, **kwargs)  # type: ignore[call-arg]
        start_at(self.layer_norm_weight, 1.0)


class _GroupedLinear(_NoExtraState):
    """The linear layers of all experts of a rank."""

    num_gemms: int

    def _split_extra_state(self, state: None) -> list[None]:
        return [None] * self.num_gemms


class _Norm:
    """Makes norms, LayerNorm or RMSNorm by the config."""

    wrap: Any

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """Make the norm of ``[..., hidden_size]``: a module of the package's own class."""
        norm = cls.wrap(config=config, hidden_size=hidden_size, eps=eps)
        start_at(norm.weight, 1.0)
        norm.get_extra_state = _nothing
        norm.set_extra_state = _nothing
        return norm


def _nothing(*_: Any) -> None:
    """Stands for the state that a norm could have beside its weights."""


class _CoreAttention:
    """Transformer Engine's attention where it is one of its fused kernels; under a mask, and in float32, torch's.

    Its ``causal`` attention ignores a mask without a word, and its arbitrary masks hold all scores.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **kwargs: Any):
        super().__init__(  # type: ignore[call-arg]
            config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, **kwargs
        )
        self.unfused = SDPACoreAttention(config, layer_number, attn_mask_type, **kwargs)

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
        """Attend; see :meth:`megavlm.models.backend.torch.SDPACoreAttention.forward`."""
        mask_type = self.unfused.attn_mask_type if attn_mask_type is None else attn_mask_type
        is_square = mask_type != AttnMaskType.causal or query.shape[0] == key.shape[0]
        if attention_mask is None and query.dtype in _FUSED_DTYPES and is_square:
            assert attention_bias is None
            assert packed_seq_params is None
            return super().forward(query, key, value, None, mask_type)  # type: ignore[misc]
        return self.unfused(query, key, value, attention_mask, mask_type, attention_bias, packed_seq_params)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """It has no weights."""
        return {}


class RotarySelfAttention(SelfAttention):
    """Self-attention whose rotary positions are fused where all rows have the same.

    The fused kernel takes one table of frequencies. Packed rows and rows padded on the left have one each, which it
    would take the first of.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._config = config
        self._unfused_config = copy.copy(config)
        self._unfused_config.apply_rope_fusion = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, as megatron-core's ``SelfAttention`` does."""
        frequencies = kwargs.get("rotary_pos_emb")
        rows_differ = isinstance(frequencies, Tensor) and frequencies.shape[1] > 1
        self.config = self._unfused_config if rows_differ else self._config
        return super().forward(*args, **kwargs)
