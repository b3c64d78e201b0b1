"""What a recipe can say about the megatron-core engine and its optimizer."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch

from megavlm.config import Config
from megavlm.engines.fp8 import Fp8Config, pad_multiple
from megavlm.engines.learning_rate import resolve_learning_rate


class MegatronEngineConfig(Config):
    """Layout, precision and memory settings. Names are megatron-core's."""

    kind: Literal["megatron"] = "megatron"
    backend: Literal["torch", "transformer_engine", "fp8_emulation"] = "torch"
    """Implementation of the layers: ``torch`` runs everywhere; ``transformer_engine`` has fused kernels and FP8 on
    GPUs; ``fp8_emulation`` rounds as FP8 does, slowly, on any machine. Checkpoints are the same."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """``bf16`` keeps float32 master weights and gradients; ``fp8`` is ``bf16`` with FP8 matrix products."""
    fp8: Fp8Config | None = None
    """Scaling and parts of FP8, read with ``precision: fp8``; None: the defaults."""
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
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]] | None = None
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
    hang_timeout_seconds: pydantic.PositiveFloat = 300.0
    """A run of which no rank gets anywhere (to its next micro-batch, say) for so long is ended, by every rank."""
    lost_timeout_seconds: pydantic.PositiveFloat = 60.0
    """A rank that gives no sign of life for so long, while the others wait, is lost: the others end the run."""

    @pydantic.model_validator(mode="after")
    def _fp8_has_layers(self) -> "MegatronEngineConfig":
        if self.precision == "fp8" and self.backend == "torch":
            raise ValueError(
                f"engine.precision='fp8': engine.backend={self.backend!r} has no FP8. Set it to transformer_engine, or "
                "to fp8_emulation to see on any machine what FP8 does to the loss."
            )
        if self.precision != "fp8" and self.backend == "fp8_emulation":
            raise ValueError(
                f"engine.backend='fp8_emulation': there is nothing to emulate in engine.precision={self.precision!r}. "
                "Set precision to fp8, or backend to torch."
            )
        return self

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
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def active_fp8(self) -> Fp8Config | None:
        """What is FP8; None in other precisions."""
        return (self.fp8 or Fp8Config()) if self.precision == "fp8" else None

    @property
    def bf16_parts(self) -> tuple[str, ...]:
        """Parts of a model that stay in bfloat16 in an FP8 run."""
        return self.active_fp8.bf16_parts if self.active_fp8 is not None else ()

    @property
    def pad_multiple(self) -> int:
        """Rows of a batch are padded to a multiple of this."""
        splits = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return pad_multiple(splits=splits, config=self.active_fp8)

    def on_any_machine(self) -> "MegatronEngineConfig":
        """The same layout with layers that any machine has, for counting weights and memory."""
        precision = "fp32" if self.precision == "fp32" else "bf16"
        return self.model_copy(update={"backend": "torch", "precision": precision, "fp8": None})

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
        is_fused = self.backend == "transformer_engine"
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline_model_parallel_size,
            "sequence_parallel": self.sequence_parallel,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
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
            # Fused kernels, which the torch backend does without. The output layer is megatron-core's own, whose fused
            # accumulation of gradients is in Apex.
            "gradient_accumulation_fusion": is_fused and _has_fused_accumulation(),
            "bias_dropout_fusion": is_fused,
            "bias_activation_fusion": is_fused,
            "masked_softmax_fusion": False,  # no attention here holds its scores
            "apply_rope_fusion": is_fused,
            **(self.active_fp8.megatron_fields() if self.active_fp8 is not None else {}),
        }


def _has_fused_accumulation() -> bool:
    """Whether Apex's kernel that adds a weight's gradient to the float32 one is installed."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


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
