"""What a recipe can say about the DeepSpeed engine, and DeepSpeed's own configuration made from it."""

from pathlib import Path
from typing import Any, Literal

import pydantic
import torch

from megavlm.engines.config import MegatronEngineConfig

Offload = Literal["cpu", "nvme"]

_OF_STAGE_3 = (
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_param_persistence_threshold",
    "sub_group_size",
)


class DeepSpeedEngineConfig(MegatronEngineConfig):
    """ZeRO around megatron-core's modules. Names are DeepSpeed's; those of the layout are megatron-core's.

    Tensor parallelism, sequence parallelism and recomputation are those of the megatron engine. Pipeline stages and
    experts are refused.
    """

    kind: Literal["deepspeed"] = "deepspeed"  # type: ignore[assignment]
    zero_stage: int = 2
    """What data-parallel ranks share instead of each holding it: 1 the optimizer's state, 2 gradients too, 3 weights
    too."""
    offload_optimizer: Offload | None = None
    """Where the optimizer's state is kept and updated; None: where the model is. ``nvme`` needs stage 3."""
    offload_param: Offload | None = None
    """Where the shares of the weights are kept between their uses; stage 3 only. None: where the model is."""
    nvme_path: Path | None = None
    """Folder on a local disk for what is offloaded to ``nvme``. Each rank makes one of its own in it for as long as it
    runs."""
    reduce_bucket_size: pydantic.PositiveInt = 500_000_000
    """Gradients reduced at once, in elements."""
    stage3_prefetch_bucket_size: pydantic.NonNegativeInt = 50_000_000
    """Stage 3: weights gathered ahead of their use, in elements. Weights on ``nvme`` are not."""
    stage3_max_live_parameters: pydantic.NonNegativeInt = 1_000_000_000
    """Stage 3: weights held whole on a rank at a time, in elements."""
    stage3_param_persistence_threshold: pydantic.NonNegativeInt = 100_000
    """Stage 3: weights of fewer elements stay whole on every rank."""
    sub_group_size: pydantic.PositiveInt = 1_000_000_000
    """Stage 3: weights updated at once, in elements of a rank's share. What is offloaded to ``nvme`` passes through CPU
    memory in such pieces, at 20 bytes an element."""

    @pydantic.model_validator(mode="after")
    def _stage_is_right(self) -> "DeepSpeedEngineConfig":
        if self.zero_stage not in (1, 2, 3):
            why = (
                "without ZeRO, DeepSpeed counts Adam's steps wrongly in bfloat16. Choose 1, 2 or 3, or "
                "engine.kind=megatron"
                if self.zero_stage == 0
                else "is no stage of ZeRO. Choose 1, 2 or 3"
            )
            raise ValueError(f"engine.zero_stage={self.zero_stage}: {why}.")
        return self

    @pydantic.model_validator(mode="after")
    def _offload_fits(self) -> "DeepSpeedEngineConfig":
        if self.offload_param is not None and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload_param={self.offload_param}: every rank needs its whole weights at zero_stage="
                f"{self.zero_stage}. Set zero_stage=3, or leave it out."
            )
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload_optimizer=nvme: needs zero_stage=3, which is {self.zero_stage}. Offload to cpu, or "
                "set zero_stage=3."
            )
        read_ahead = self.stage3_prefetch_bucket_size
        default = type(self).model_fields["stage3_prefetch_bucket_size"].default
        if self.offload_param == "nvme" and read_ahead not in (0, default):
            raise ValueError(
                f"engine.stage3_prefetch_bucket_size={read_ahead}: weights on nvme are not read ahead. Leave it out, "
                "or offload weights to cpu."
            )
        if self.uses_nvme and self.nvme_path is None:
            raise ValueError("engine.nvme_path=None: nvme is offloaded to. Give a folder on a local disk.")
        if self.nvme_path is not None and not self.uses_nvme:
            raise ValueError(
                f"engine.nvme_path={self.nvme_path}: nothing is offloaded there. Set offload_optimizer or "
                "offload_param to nvme, or leave it out."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _belongs_to_this_stage(self) -> "DeepSpeedEngineConfig":
        for name in _OF_STAGE_3:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.zero_stage != 3 and value != default:
                raise ValueError(
                    f"engine.{name}={value}: is of zero_stage=3, and zero_stage is {self.zero_stage}. Leave it out, or "
                    "set zero_stage=3."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _belongs_to_this_engine(self) -> "DeepSpeedEngineConfig":
        """What is left of the megatron engine's settings has to have its default."""
        why = {
            "pipeline_model_parallel_size": "ZeRO is not run over pipeline stages",
            "virtual_pipeline_model_parallel_size": "ZeRO is not run over pipeline stages",
            "expert_model_parallel_size": "experts are not run under ZeRO",
            "expert_tensor_parallel_size": "experts are not run under ZeRO",
            "moe_token_dispatcher_type": "experts are not run under ZeRO",
            "use_distributed_optimizer": "zero_stage says what is shared",
            "overlap_grad_reduce": "it belongs to megatron-core's gradient buffers",
            "overlap_param_gather": "it belongs to megatron-core's distributed optimizer",
        }
        for name, reason in why.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and (value, default) != (1, None):
                raise ValueError(
                    f"engine.{name}={value}: {reason}. Set it to {default}, or choose engine.kind=megatron."
                )
        if self.precision == "fp8":
            raise ValueError("engine.precision='fp8': is not run under ZeRO. Set bf16, or choose engine.kind=megatron.")
        return self

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is offloaded to NVMe."""
        return "nvme" in (self.offload_optimizer, self.offload_param)

    def check_experts(self, num_moe_experts: int | None) -> None:
        """Refuse a model with experts.

        Raises:
            ValueError: it has some.
        """
        if num_moe_experts is not None:
            raise ValueError(
                f"engine.kind=deepspeed: model.language.moe has num_moe_experts={num_moe_experts}, and experts are not "
                "run under ZeRO. Choose engine.kind=megatron."
            )

    def on_any_machine(self) -> MegatronEngineConfig:
        """The same layout under the megatron engine, which answers and counts for a model trained here."""
        shared = {name: getattr(self, name) for name in MegatronEngineConfig.model_fields if name != "kind"}
        return MegatronEngineConfig(**shared).on_any_machine()

    def megatron_settings(self) -> dict[str, Any]:
        """As the megatron engine's; the fused accumulation of gradients needs that engine's buffers."""
        return {**super().megatron_settings(), "gradient_accumulation_fusion": False}

    def deepspeed_settings(
        self, *, clip_grad: float, swap_folder: Path | None = None, largest_share: int = 0
    ) -> dict[str, Any]:
        """DeepSpeed's configuration.

        The engine itself says how many micro-batches a step has and what their losses are divided by, so the sizes of
        batches here are 1.

        Args:
            clip_grad: largest global gradient norm; 0: no clipping.
            swap_folder: of this rank, for what is offloaded to NVMe.
            largest_share: elements of the largest share of a weight on a rank, if weights are offloaded to NVMe.
        """
        is_bf16 = self.dtype == torch.bfloat16
        zero: dict[str, Any] = {
            "stage": self.zero_stage,
            "reduce_bucket_size": self.reduce_bucket_size,
            "allgather_bucket_size": self.reduce_bucket_size,
            "overlap_comm": False,
            "contiguous_gradients": True,
        }
        if self.zero_stage == 3:
            zero |= {name: getattr(self, name) for name in _OF_STAGE_3}
        for name in ("offload_optimizer", "offload_param"):
            device = getattr(self, name)
            if device is not None:
                zero[name] = {"device": device, "pin_memory": torch.cuda.is_available()}
            if device == "nvme":
                zero[name]["nvme_path"] = str(swap_folder)
        if self.offload_optimizer == "nvme":
            zero["offload_optimizer"]["buffer_count"] = 5  # weights, two moments, gradients, and one to read them by
        if self.offload_param == "nvme":
            # DeepSpeed would keep the first 1e9 elements in CPU memory all the same. Reading ahead, it asks for a
            # weight twice where forward and backward pass meet, and fails ("already assigned swap buffer";
            # zero/partitioned_param_coordinator.py, __prefetch_nvme_param_partitions).
            zero["offload_param"] |= {"max_in_cpu": 0, "buffer_size": largest_share}
            zero["stage3_prefetch_bucket_size"] = 0
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_grad,
            "zero_optimization": zero,
            # torch's fused AdamW runs on CPUs too, and nothing has to be compiled for it
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": is_bf16, "check_grad_overflow": True} if is_bf16 else {"enabled": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "wall_clock_breakdown": False,
        }
