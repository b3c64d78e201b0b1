"""What a recipe can say about the megatron-core engine and its optimizer."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch

from megavlm.config import Config
from megavlm.engines.learning_rate import resolve_learning_rate


class MegatronEngineConfig(Config):
    """Layout, precision and memory settings. Names are megatron-core's."""

    kind: Literal["megatron"] = "megatron"
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` keeps float32 master weights and gradients."""
    tensor_model_parallel_size: pydantic.PositiveInt = 1
    pipeline_model_parallel_size: pydantic.PositiveInt = 1
    virtual_pipeline_model_parallel_size: pydantic.PositiveInt | None = None
    """Model chunks of each pipeline rank (interleaved schedule); None: one."""
    sequence_parallel: bool = False
    """Split norms and dropout over the sequence on tensor-parallel ranks."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and the update over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or ``recompute_modules`` of each layer."""
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: pydantic.PositiveInt | None = None
    recompute_modules: list[str] | None = None
    expert_model_parallel_size: pydantic.PositiveInt = 1
    """Data-parallel ranks that share the experts of a layer."""
    expert_tensor_parallel_size: pydantic.PositiveInt | None = None
    """Ranks that share one expert; None: as many as share other layers."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens come to their experts: each sent where it goes, or all sent to all (few experts, high top-k)."""
    moe_grouped_gemm: bool = True
    """One grouped matrix product over all experts of a rank, where torch takes their shapes; or one after another."""
    distributed_timeout_minutes: pydantic.PositiveFloat = 10.0
    """How long a rank waits for the others before it gives up."""

    @pydantic.model_validator(mode="after")
    def _recompute_is_whole(self) -> "MegatronEngineConfig":
        if self.recompute_granularity == "full" and not (self.recompute_method and self.recompute_num_layers):
            raise ValueError(
                "engine.recompute_granularity='full': needs recompute_method (uniform or block) and "
                f"recompute_num_layers, given {self.recompute_method} and {self.recompute_num_layers}."
            )
        if self.recompute_granularity != "full" and (self.recompute_method or self.recompute_num_layers):
            raise ValueError(
                f"engine.recompute_method={self.recompute_method!r}: only means something with "
                f"recompute_granularity='full', which is {self.recompute_granularity!r}."
            )
        return self

    # Fixed for now, and named because the checks of the layout ask for it.
    @property
    def context_parallel_size(self) -> int:
        """Ranks that share one sequence: always 1."""
        return 1

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def pads_micro_batches(self) -> bool:
        """Whether all micro-batches of a step are padded to one length.

        With two interleaved pipeline stages the next rank is the previous rank, and megatron-core
        (``P2PCommunicator._communicate_shapes``) pairs the shapes that stages tell each other with the wrong receives.
        The allgather dispatcher needs one length on all ranks that share experts.
        """
        is_interleaved = (self.virtual_pipeline_model_parallel_size or 1) > 1
        return (self.pipeline_model_parallel_size == 2 and is_interleaved) or self.gathers_tokens

    @property
    def gathers_tokens(self) -> bool:
        """Whether tokens come to their experts by gathering all tokens."""
        return self.moe_token_dispatcher_type == "allgather"

    def megatron_settings(self) -> dict[str, Any]:
        """TransformerConfig arguments that come from the layout, the precision and the engine's way of working."""
        is_pipelined = self.pipeline_model_parallel_size > 1
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size,
            "sequence_parallel": self.sequence_parallel,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.precision == "bf16",
            "recompute_granularity": self.recompute_granularity,
            "recompute_method": self.recompute_method,
            "recompute_num_layers": self.recompute_num_layers,
            "recompute_modules": self.recompute_modules,
            # Rows of micro-batches differ in length, so stages tell each other the shape.
            "variable_seq_lengths": is_pipelined and not self.pads_micro_batches,
            "moe_token_dispatcher_type": self.moe_token_dispatcher_type,
            "moe_grouped_gemm": self.moe_grouped_gemm,
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
            "deallocate_pipeline_outputs": is_pipelined,
            # Losses are summed over tokens; the sum is divided once, by the global number of trained tokens.
            "calculate_per_token_loss": True,
            # Weights come from megavlm.models.initialization or a checkpoint, never from the layers' own generators.
            "perform_initialization": False,
            "use_cpu_initialization": False,
            # Fused kernels of Apex and Transformer Engine, which the torch backend does without.
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
        }


class OptimizerSettings(Config):
    """AdamW. Names are megatron-core's."""

    lr: pydantic.PositiveFloat
    """Peak learning rate. ``{law: mm1, num_parameters: N}`` becomes MM1's for N parameters when the recipe is read."""
    min_lr: pydantic.NonNegativeFloat = 0.0
    """Learning rate at the end of the decay. ``{times_lr: x}`` becomes x times ``lr``."""
    weight_decay: pydantic.NonNegativeFloat = 0.01
    """Not applied to biases, norms and other vectors. ``{times_lr: x}`` becomes x times ``lr``."""
    adam_beta1: float = pydantic.Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = pydantic.Field(0.95, ge=0.0, lt=1.0)
    adam_eps: pydantic.PositiveFloat = 1e-8
    clip_grad: pydantic.NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _apply_laws(cls, settings: Any) -> Any:
        return resolve_learning_rate(settings) if isinstance(settings, Mapping) else settings
