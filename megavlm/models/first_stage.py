"""megatron-core's config of the parts that run whole on the first pipeline stage: vision encoder and connector."""

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

_WHOLE_ON_FIRST_STAGE = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "defer_embedding_wgrad_compute": False,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}


def first_stage_config(megatron_settings: Mapping[str, Any], **fields: Any) -> TransformerConfig:
    """Return megatron-core's config of a part that runs whole on the first pipeline stage.

    Such a part (a vision encoder, a connector) shares the tensor-parallel layout and the precision of the language
    model, and nothing else of the layout: a tile is short, so it is neither split over the sequence nor over stages.

    Args:
        megatron_settings: TransformerConfig arguments that come from the layout and the precision.
        fields: the part's own TransformerConfig arguments.
    """
    own = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # megatron-core's fused bias and GELU computes the tanh approximation, whatever activation_func says.
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**{**megatron_settings, **_WHOLE_ON_FIRST_STAGE, **own, **fields})
