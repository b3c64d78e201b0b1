"""The layer spec of a mixture of experts."""

from typing import Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.models.backend import Backend
from megavlm.models.moe.experts import GroupedExperts, can_group
from megavlm.models.moe.router import Router


def moe_spec(backend: Backend, config: TransformerConfig) -> ModuleSpec:
    """Feed-forward experts behind a router, in the place of a layer's feed-forward.

    Args:
        backend: where the layers of an expert come from.
        config: of the model; ``moe_grouped_gemm`` asks for one grouped product over all experts, which is done where
            torch takes their shapes, and in FP8 where the backend has such experts.
    """
    experts: Any = ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=backend.column_parallel_linear, linear_fc2=backend.row_parallel_linear),
    )
    if config.moe_grouped_gemm and config.fp8 and backend.quantized_experts is not None:
        experts = backend.quantized_experts
    elif config.moe_grouped_gemm and can_group(config):
        experts = GroupedExperts
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
