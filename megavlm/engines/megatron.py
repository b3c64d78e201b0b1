"""The megatron-core engine: process groups, wrapped model chunks, the optimizer and one step of a run.

The same code runs on gloo and nccl. It knows nothing of what the model computes: a chunk is any module that maps a
:class:`~megavlm.batch.Batch` to hidden states, and on the last stage to per-token losses ``[N, S]`` or to logits. A
chunk with losses of whole rows besides (BLIP-2's first stage) gives both, ``[N, S]`` and ``[N, R]``, and names them in
``loss_names``: that of tokens first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.engines import fp8, guards
from megavlm.engines.config import MegatronEngineConfig, OptimizerSettings
from megavlm.engines.fused_adam import FusedAdam
from megavlm.engines.global_loss import GlobalLoss, Sums
from megavlm.engines.parameter_group import config_overrides
from megavlm.engines.rank_talk import RankTalk
from megavlm.engines.step import LossSums, Stage, StepResult
from megavlm.runtime import current_device
from megavlm.runtime.activity import ACTIVITY, Phase
from megavlm.runtime.sharding import sharding_metadata


class MegatronEngine(RankTalk):
    """One rank's share of a run. Use: ``start``, ``wrap``, ``build_optimizer``, then steps; ``stop`` belongs to the
    process (:func:`megavlm.runtime.process.stop`)."""

    def __init__(self, config: MegatronEngineConfig) -> None:
        self.config = config
        self.device = current_device()
        self.chunks: list[MegatronModule] = []
        """This rank's model chunks as they were built."""
        self.loss = GlobalLoss(self.device)
        """Puts the losses of micro-batches together."""
        self._optimizer: MegatronOptimizer | None = None
        self._emulating: list[fp8.EmulatingLayer] = []
        self._wrapped: list[MegatronModule] = []

    # ---- start -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make megatron-core's process groups. The default process group must exist and the layout be checked
        (:func:`megavlm.runtime.layout.check_parallel_config`).

        Raises:
            ValueError: the precision is FP8, not emulated, and this machine cannot do it.
        """
        if self.config.active_fp8 is not None and self.config.backend != "fp8_emulation":
            fp8.check_machine(self.config.active_fp8)
        guards.install_optimizer()
        guards.supply_missing_names()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.config.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=self.config.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=self.config.expert_model_parallel_size,
            expert_tensor_parallel_size=self.config.expert_tensor_parallel_size,
            distributed_timeout_minutes=math.ceil(self.config.distributed_timeout_minutes),
            create_gloo_process_groups=False,  # only for a way of saving that is not used
        )

    @property
    def data_parallel_rank(self) -> int:
        """Which share of the global batch this rank works on."""
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        """Into how many shares the global batch is cut."""
        return parallel_state.get_data_parallel_world_size()

    def stages(self) -> list[Stage]:
        """The places in the pipeline that this rank fills, in order."""
        num_chunks = self.config.virtual_pipeline_model_parallel_size
        if num_chunks is None:
            return [
                Stage(
                    pre_process=parallel_state.is_pipeline_first_stage(),
                    post_process=parallel_state.is_pipeline_last_stage(),
                    vp_stage=None,
                )
            ]
        return [
            Stage(
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                vp_stage=chunk,
            )
            for chunk in range(num_chunks)
        ]

    # ---- model and optimizer -----------------------------------------------------------------------------------------

    def wrap(self, chunks: Sequence[MegatronModule], *, training: bool = True) -> None:
        """Take this rank's model chunks (one per entry of :meth:`stages`), with weights and ``requires_grad`` set.

        Args:
            chunks: the modules; moved to the device in place.
            training: make gradient buffers; False for evaluation and generation only.
        """
        self.chunks = [chunk.to(self.device) for chunk in chunks]
        guards.before_wrap(self.chunks)
        if not training:
            fp8.switch_off(self.chunks)
        self._emulating = fp8.emulating_layers(self.chunks)
        modules: list[MegatronModule] = list(self.chunks)
        if self.config.dtype == torch.bfloat16:
            modules = [Float16Module(module.config, module) for module in modules]
        if training:
            has_replicas = parallel_state.get_data_parallel_world_size() > 1
            # copies of experts may lie on tensor-parallel ranks
            has_replicas |= self._has_experts and parallel_state.get_expert_data_parallel_world_size() > 1
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=self.config.use_distributed_optimizer,
                overlap_grad_reduce=self.config.overlap_grad_reduce and has_replicas,
                overlap_param_gather=self.config.overlap_param_gather and has_replicas,
            )
            modules = [
                # only the first chunk of an interleaved schedule gains from small buckets (as in Megatron-LM)
                DistributedDataParallel(module.config, ddp_config, module, disable_bucketing=number > 0)
                for number, module in enumerate(modules)
            ]
            guards.skip_lone_collectives(modules)
        self._wrapped = modules
        for chunk in self.chunks:
            guards.settle_config(chunk.config)
            chunk.config.finalize_model_grads_func = _finalize_summed_grads
            chunk.config.grad_scale_func = self.loss.scale
            chunk.config.auxiliary_loss_scale_func = lambda: self.loss.auxiliary_scale

    @property
    def _has_experts(self) -> bool:
        return any(chunk.config.num_moe_experts for chunk in self.chunks)

    @property
    def optimizer(self) -> MegatronOptimizer:
        """megatron-core's optimizer; :meth:`build_optimizer` makes it."""
        assert self._optimizer is not None, "build_optimizer comes first"
        return self._optimizer

    def build_optimizer(self, settings: OptimizerSettings) -> MegatronOptimizer:
        """Make the optimizer of the parameters that train, in the groups of ``parameter_group.py``."""
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            params_dtype=self.config.dtype,
            bf16=self.config.dtype == torch.bfloat16,
            use_distributed_optimizer=self.config.use_distributed_optimizer,
            overlap_param_gather=self.config.overlap_param_gather,
        )
        trained = (
            parameter for module in self._wrapped for parameter in module.parameters() if parameter.requires_grad
        )
        self._optimizer = get_megatron_optimizer(
            config,
            self._wrapped,
            config_overrides=config_overrides(config, trained),
            use_gloo_process_groups=False,
        )
        for inner in self._inner_optimizers():
            if isinstance(inner.optimizer, FusedAdam):
                inner.optimizer.initialize_state()  # a run may be saved before its first update
        return self._optimizer

    def _inner_optimizers(self) -> list[MegatronOptimizer]:
        """Experts have an optimizer of their own."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    # ---- state -------------------------------------------------------------------------------------------------------

    def sharded_state_dict(self, *, with_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
        """Return megatron-core's sharded state dict of the model and, if asked, of the optimizer.

        Keys are ``model`` (``model0``, ``model1`` ... with an interleaved schedule) and ``optimizer``.
        """
        metadata = sharding_metadata()
        names = ["model"] if len(self.chunks) == 1 else [f"model{number}" for number in range(len(self.chunks))]
        state: dict[str, Any] = {
            name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, self.chunks, strict=True)
        }
        if with_optimizer:
            # of one chunk the optimizer wants the chunk's own dict, of several the dict of them
            model_state = state["model"] if len(self.chunks) == 1 else dict(state)
            state["optimizer"] = self.optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=metadata
            )
        return state

    def load_state_dict(self, state: dict[str, Any], *, with_optimizer: bool) -> None:
        """Take back what was loaded into a :meth:`sharded_state_dict`.

        Raises:
            ValueError: the optimizer's state is not whole.
        """
        for number, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model" if len(self.chunks) == 1 else f"model{number}"], strict=False)
        if with_optimizer:
            if self.config.use_distributed_optimizer:
                guards.check_optimizer_state(state["optimizer"])
            self.optimizer.load_state_dict(state["optimizer"])
        elif self._optimizer is not None:
            self.optimizer.reload_model_params()

    # ---- steps -------------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], accept: Callable[[float], bool] | None = None) -> StepResult:
        """Forward, backward and update on this rank's micro-batches of one global batch.

        A global batch without a trained token, with gradients that are not finite, or with a loss that is not accepted,
        changes nothing and says so.

        Args:
            batches: of this rank.
            accept: given the loss, says whether to update the weights; asked on every rank, and one no is enough.
        """
        ACTIVITY.begin(Phase.COMPUTING)
        self._clear_grads()
        count = self.loss.settle(batches)
        if count.trained_tokens == 0:
            return StepResult(0.0, 0, 0.0, "no_trained_token")
        sums = self._run_schedule(batches, forward_only=False)
        loss = sums.loss / count.weight_sum
        fp8.update_scales(self._emulating, self.device)
        ACTIVITY.begin(Phase.UPDATING)
        skip_reason: str | None
        if accept is not None and self.any_rank(not accept(loss)):
            skip_reason, grad_norm = "loss_spike", self._grad_norm()
        else:
            grad_norm, updated = self._update_weights()
            skip_reason = None if updated else "grad_not_finite"
        terms = {name: term / count.weight_sum for name, term in sums.terms.items()}
        return StepResult(loss, count.trained_tokens, grad_norm, skip_reason, tuple(sums.sources), terms)

    def _clear_grads(self) -> None:
        """Begin a step."""
        for module in self._wrapped:
            if not module.training:  # walks over all submodules: 5 % of a step of a tiny model
                module.train()
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

    def evaluate(self, batches: Sequence[Batch]) -> LossSums:
        """Sum up the losses of a global batch, without training."""
        for module in self._wrapped:
            module.eval()
        batches = [replace(batch, loss_mask=(batch.loss_mask > 0).to(batch.loss_mask.dtype)) for batch in batches]
        count = self.loss.settle(batches)
        with torch.no_grad():
            sums = self._run_schedule(batches, forward_only=True)
        return LossSums(sums.loss, count.trained_tokens, sums.terms)

    def logits(self, batch: Batch, wanted: Tensor, vocab_size: int, cache: Any = None) -> Tensor:
        """Logits of one micro-batch at chosen positions, the same on every rank of the model.

        Args:
            batch: the micro-batch.
            wanted: ``[N, S]``, nonzero where logits are wanted.
            vocab_size: V of the model.
            cache: what the model keeps between the steps of a generation; each chunk is given it.

        Returns:
            ``[M, V]`` float32, row by row.
        """
        for module in self._wrapped:
            module.eval()
        wanted = wanted.to(self.device)

        def forward_step(iterator: Iterator[Batch], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            output = module(next(iterator), wanted_logits=wanted, cache=cache)
            return output, lambda logits: (logits.sum(), {"logits": logits})

        # the interleaved schedule takes micro-batches by the number of stages
        copies = self.config.pipeline_model_parallel_size if len(self._wrapped) > 1 else 1
        with torch.no_grad():
            outputs = self._forward_backward(forward_step, [batch] * copies, forward_only=True)
        logits = torch.empty(int(wanted.count_nonzero()), vocab_size, device=self.device)
        if outputs:
            logits.copy_(outputs[0]["logits"])
        self._broadcast_from_last_stage(logits)
        return logits

    def _run_schedule(self, batches: Sequence[Batch], *, forward_only: bool) -> Sums:
        """Run all micro-batches; return the losses of the global batch."""
        outputs = self._forward_backward(self.loss.forward_step, batches, forward_only=forward_only)
        names = getattr(self.chunks[-1], "loss_names", ())
        return self.loss.sum_up(outputs, names, self._broadcast_from_last_stage)

    def _forward_backward(
        self, forward_step: Callable[..., Any], batches: Sequence[Batch], *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        length = max(batch.tokens.shape[1] for batch in batches)
        context_length = max(batch.context_length for batch in batches)
        if self.config.gathers_tokens and self.config.expert_model_parallel_size > 1:
            length, context_length = self._longest_of_replicas(length, context_length)
        if self.config.pads_micro_batches:
            batches = [batch.padded_to(length, context_length) for batch in batches]
        iterators = [counted(batches) for _ in self._wrapped]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._wrapped,
            num_microbatches=len(batches),
            seq_length=length + context_length,  # where lengths differ, stages tell each other the real shapes
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )

    def _longest_of_replicas(self, *lengths: int) -> list[int]:
        longest = torch.tensor(lengths, device=self.device)
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX, group=group)
        return longest.tolist()

    def _update_weights(self) -> tuple[float, bool]:
        """Clip and step. Returns the gradient norm and whether the weights were updated (the same on every rank)."""
        grad_norm = self._grad_norm()
        if not math.isfinite(grad_norm):
            return grad_norm, False
        clip_grad = self.optimizer.config.clip_grad
        if grad_norm > clip_grad > 0.0:
            parameters = (parameter for inner in self._inner_optimizers() for parameter in inner.get_parameters())
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if grads:  # a pipeline stage may be frozen whole
                torch._foreach_mul_(grads, clip_grad / (grad_norm + 1e-6))
        self.optimizer.step_with_ready_grads()
        return grad_norm, True

    def _grad_norm(self) -> float:
        """Make the gradients ready for an update; return their global norm."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _broadcast_from_last_stage(self, tensor: Tensor) -> None:
        if self.config.pipeline_model_parallel_size > 1:
            torch.distributed.broadcast(
                tensor,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )


def counted(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Hand out micro-batches, and note each: a rank that still begins one does not hang."""
    for batch in batches:
        ACTIVITY.advance()
        yield batch


def _finalize_summed_grads(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients over data, sequence and tied embeddings. The division by tokens is in the loss already."""
    finalize_model_grads(model, None, **kwargs)
