"""The DeepSpeed engine: ZeRO in place of megatron-core's data parallelism, around the same modules.

Layout, losses and their normalisation, checkpoints, evaluation and generation are the megatron engine's. What differs:
who holds optimizer state, gradients and weights, and how gradients come together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, _get_param_groups
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.engines import guards
from megavlm.engines.config import OptimizerSettings
from megavlm.engines.deepspeed import state as zero_state
from megavlm.engines.deepspeed.config import DeepSpeedEngineConfig
from megavlm.engines.deepspeed.library import import_deepspeed, load_async_io
from megavlm.engines.deepspeed.nvme import SwapFolder, check_lockable, num_bytes_of_buffers, num_bytes_on_nvme
from megavlm.engines.deepspeed.zero import Zero
from megavlm.engines.megatron import MegatronEngine, counted
from megavlm.engines.parameter_group import config_overrides
from megavlm.runtime.process import before_stop


class DeepSpeedEngine(MegatronEngine):
    """One rank's share of a run under ZeRO.

    DeepSpeed takes the model over at the first step, or when the run is first saved: whatever is loaded is loaded into
    the plain modules before that.
    """

    config: DeepSpeedEngineConfig

    def __init__(self, config: DeepSpeedEngineConfig) -> None:
        super().__init__(config)
        self._adam: torch.optim.AdamW | None = None
        self._clip_grad = 0.0
        self._zero: Zero | None = None
        self._model_state: dict[str, Any] = {}
        self._moments: dict[torch.nn.Parameter, Mapping[str, Tensor]] = {}
        """Loaded, and not yet given to DeepSpeed."""
        self._num_updates = 0
        self._last_loss: Tensor | None = None
        """Of the last micro-batch, whose backward pass waits until it is known whether the step counts."""
        self._swap_folder: SwapFolder | None = None

    def start(self) -> None:
        """As the megatron engine's; makes the folder for what is offloaded to NVMe.

        Raises:
            ValueError: DeepSpeed is not installed, or cannot offload as it is asked to.
        """
        import_deepspeed()
        if self.config.nvme_path is not None:
            self._swap_folder = SwapFolder(self.config.nvme_path, torch.distributed.get_rank())
            before_stop(self._swap_folder.remove)
            load_async_io(self.config.nvme_path)
        super().start()

    # ---- model and optimizer -----------------------------------------------------------------------------------------

    def wrap(self, chunks: Sequence[MegatronModule], *, training: bool = True) -> None:
        """Take this rank's model, with weights and ``requires_grad`` set.

        Args:
            chunks: one module; moved to the device in place, at stage 3 only when DeepSpeed cuts it.
            training: prepare it for ZeRO; False for evaluation and generation only, as under the megatron engine.

        Raises:
            ValueError: the model has experts, or disk or memory have no room for what is offloaded.
        """
        if not training:
            super().wrap(chunks, training=False)
            return
        [chunk] = chunks
        self.config.check_experts(chunk.config.num_moe_experts)
        if self._swap_folder is not None:
            check_lockable(num_bytes_of_buffers(chunk, self.config))
            self._swap_folder.check_room(num_bytes_on_nvme(chunk, self.config))
        is_cut = self.config.zero_stage == 3
        self.chunks = [chunk if is_cut else chunk.to(self.device)]
        guards.before_wrap(self.chunks)
        guards.settle_config(chunk.config)
        is_bf16 = self.config.dtype == torch.bfloat16
        self._wrapped = [Float16Module(chunk.config, chunk) if is_bf16 else chunk]
        # weights that are cut are gathered by all ranks together, so all must run the same modules
        chunk.always_encodes = is_cut
        _sum_over_tensor_ranks(chunk)

    @property
    def optimizer(self) -> torch.optim.AdamW:  # type: ignore[override]
        """Holds the parameter groups, whose learning rate and weight decay the schedule sets."""
        assert self._adam is not None, "build_optimizer comes first"
        return self._adam

    def build_optimizer(self, settings: OptimizerSettings) -> torch.optim.AdamW:  # type: ignore[override]
        """Make the optimizer of the parameters that train, in the groups of ``parameter_group.py``."""
        config = OptimizerConfig(optimizer="adam", lr=settings.lr, min_lr=settings.min_lr)
        trained = (parameter for parameter in self.chunks[0].parameters() if parameter.requires_grad)
        groups = _get_param_groups(self.chunks, config, config_overrides(config, trained))
        self._clip_grad = settings.clip_grad
        self._adam = torch.optim.AdamW(
            groups,
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,  # the kernel that the megatron engine uses
        )
        return self._adam

    @property
    def _running(self) -> Zero:
        """DeepSpeed around the model; it begins with what has been loaded until now."""
        if self._zero is None:
            # cut parameters have no shape of their own any more, so their places are noted before
            self._model_state = super().sharded_state_dict(with_optimizer=False)["model"]
            self._zero = Zero(
                self._wrapped[0],
                self.optimizer,
                self.config,
                clip_grad=self._clip_grad,
                swap_folder=self._swap_folder,
            )
            before_stop(self.close)
            for parameter, moments in self._moments.items():
                for name in zero_state.MOMENTS:
                    self._zero.set_state(parameter, name, moments[name])
            self._zero.put_back()
            self._zero.num_updates = self._num_updates
            self._moments.clear()
        return self._zero

    def close(self) -> None:
        """Let go of DeepSpeed: a process that ends without this aborts now and then. The process group still exists."""
        if self._zero is not None:
            self._zero.close()
            self._zero = None

    # ---- state -------------------------------------------------------------------------------------------------------

    def sharded_state_dict(self, *, with_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
        """As the megatron engine's, with the same keys. To be saved, whole tensors are gathered and spread over the
        data-parallel ranks. Collective."""
        if self._adam is None:
            return super().sharded_state_dict(with_optimizer=False)
        if is_loading:
            assert self._zero is None, "a run is loaded before its first step"
            state = super().sharded_state_dict(with_optimizer=False)
            if with_optimizer:
                places = zero_state.place_of_parameters(state["model"])
                state["optimizer"] = zero_state.common_state(self.optimizer.param_groups, 0)
                state["optimizer"]["param_state"] = zero_state.ask_for_moments(places)
            return state
        running, shelves = self._running, zero_state.Shelves()
        state = {"model": zero_state.keep_weights(self._model_state, shelves, running.gather_weight)}
        if with_optimizer:
            places = zero_state.place_of_parameters(self._model_state)
            state["optimizer"] = zero_state.common_state(self.optimizer.param_groups, running.num_updates)
            state["optimizer"]["param_state"] = zero_state.keep_moments(places, shelves, running.gather_state)
            running.put_back()
        return state

    def load_state_dict(self, state: dict[str, Any], *, with_optimizer: bool) -> None:
        """Take back what was loaded into a :meth:`sharded_state_dict`.

        Raises:
            ValueError: the optimizer's state is not whole, or of parameter groups that do not agree.
        """
        if with_optimizer:
            guards.check_optimizer_state(state["optimizer"])
            places = zero_state.place_of_parameters(super().sharded_state_dict(with_optimizer=False)["model"])
            self._moments = zero_state.moments_of_parameters(places, state["optimizer"]["param_state"])
            self._num_updates = zero_state.num_updates_of(state["optimizer"])
        self.chunks[0].load_state_dict(state["model"], strict=False)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _clear_grads(self) -> None:
        """DeepSpeed forgets gradients at the end of a step."""
        self._running  # noqa: B018  it begins here
        if not self._wrapped[0].training:
            self._wrapped[0].train()

    def _forward_backward(
        self, forward_step: Callable[..., Any], batches: Sequence[Batch], *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        if forward_only or self._zero is None:
            return super()._forward_backward(forward_step, batches, forward_only=forward_only)
        iterator, outputs = counted(batches), []
        for number in range(len(batches)):
            output, sum_losses = forward_step(iterator, self._zero)
            loss_sum, _, metrics = sum_losses(output)
            outputs.append(metrics)
            if number < len(batches) - 1:
                self._backward(loss_sum, is_last=False)
        self._last_loss = loss_sum
        return outputs

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        # DeepSpeed averages over the data-parallel ranks, and losses are summed
        self._running.backward(self.loss.scale(loss) * self.data_parallel_size, is_last=is_last)

    def _update_weights(self) -> tuple[float, bool]:
        """Clip and step. Returns the gradient norm and whether the weights were updated (the same on every rank)."""
        assert self._last_loss is not None
        self._backward(self._last_loss, is_last=True)
        self._last_loss = None
        return self._running.step()

    def _grad_norm(self) -> float:
        """End a step that does not count: gradients that are not finite make DeepSpeed forget them. Returns nan."""
        assert self._last_loss is not None
        self._last_loss = self._last_loss * float("nan")
        return self._update_weights()[0]


def _sum_over_tensor_ranks(chunk: MegatronModule) -> None:
    """Let gradients that are parts of a sum on each tensor-parallel rank be added up as they come.

    megatron-core's ``finalize_model_grads`` does it once, on the buffers that its own data parallelism has.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    config = chunk.config
    for name, parameter in chunk.named_parameters():
        assert not getattr(parameter, "average_gradients_across_tp_domain", False), name
        is_partial = (config.sequence_parallel and getattr(parameter, "sequence_parallel", False)) or (
            config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
        )
        if parameter.requires_grad and is_partial:
            parameter.register_hook(summed)
