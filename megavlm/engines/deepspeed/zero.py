"""One DeepSpeed engine around a module: the only file, with ``library.py``, that knows DeepSpeed.

Written against DeepSpeed 0.19.8. What of it is not public is used here alone: the flat partitions of the optimizers
and their way to files and back, and the groups that DeepSpeed remembers beyond the life of a process group.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megavlm.engines.deepspeed.config import DeepSpeedEngineConfig
from megavlm.engines.deepspeed.library import import_deepspeed, quiet
from megavlm.engines.deepspeed.nvme import AlignedGradients, SwapFolder, num_mine


class ModelParallelUnit:
    """megatron-core's groups under the names that DeepSpeed asks its ``mpu`` for."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())


class Zero:
    """A module whose training state is shared by the data-parallel ranks. Every method is collective over them."""

    def __init__(
        self,
        module: torch.nn.Module,
        adam: torch.optim.AdamW,
        config: DeepSpeedEngineConfig,
        *,
        clip_grad: float,
        swap_folder: SwapFolder | None = None,
    ) -> None:
        """Share out the state of a module. Its weights are as they are to begin with, and the moments are zero.

        Args:
            module: with weights in the run's precision.
            adam: of its parameters that train; works on shares of them from now on.
            config: what is shared, and where it is kept.
            clip_grad: largest global gradient norm; 0: no clipping.
            swap_folder: for what is offloaded to NVMe.

        Raises:
            ValueError: DeepSpeed is not installed, or a file on NVMe could not be written.
        """
        self._config = config
        self._adam = adam
        self._module = module
        self._deepspeed = import_deepspeed()
        self._swap_folder = swap_folder
        self._brought: int | None = None
        """Sub-group whose state was brought from NVMe to be seen or set."""
        self._is_changed = False
        self._has_stepped = False
        settings = config.deepspeed_settings(
            clip_grad=clip_grad,
            swap_folder=None if swap_folder is None else swap_folder.path,
            largest_share=max(map(num_mine, module.parameters())),
        )
        with quiet():
            if config.offload_param == "nvme":
                self._cut_weights(settings)
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=module,
                optimizer=adam,
                config=settings,
                mpu=ModelParallelUnit(),
                dist_init_required=False,
            )
            if config.offload_optimizer == "nvme":
                AlignedGradients(self._optimizer.optimizer_swapper)
            self._make_moments()
        self._check_files()

    def _cut_weights(self, settings: dict[str, Any]) -> None:
        """Cut the weights before ``initialize`` does: where there is no float16 (on CPUs), its own cut takes float32
        weights for bfloat16 ones (``zero/partition_parameters.py``, ``_set_dtype``)."""
        self._deepspeed.init_distributed(dist_init_required=False)
        self._deepspeed.zero.Init(
            module=self._module,
            data_parallel_group=parallel_state.get_data_parallel_group(),
            config_dict_or_path=settings,
            remote_device="nvme",
            pin_memory=torch.cuda.is_available(),
            mpu=ModelParallelUnit(),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        with quiet():
            return self._engine(*args, **kwargs)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            loss: 0-d. The gradients of the ranks are averaged.
            is_last: whether it is the last micro-batch of the step.
        """
        with quiet():
            self._engine.set_gradient_accumulation_boundary(is_last)
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        """Clip, update, forget the gradients. Returns the global gradient norm, and whether the weights were updated:
        they are not if it is not finite."""
        with quiet():
            if not self._has_stepped:
                self._check_files()
                self._has_stepped = True
            self._engine.step()
        if self._optimizer.overflow:
            return float("nan"), False
        return float(self._engine.get_global_grad_norm()), True

    # ---- state -------------------------------------------------------------------------------------------------------

    def gather_weight(self, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter's whole value, in a tensor that stays valid until the next call."""
        if self._config.zero_stage < 3:
            return parameter.detach()
        with quiet(), self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def gather_state(self, parameter: torch.nn.Parameter, name: str) -> Tensor:
        """The whole ``param``, ``exp_avg`` or ``exp_avg_sq`` of a parameter that trains, float32. After the last one
        of a pass, :meth:`put_back`."""
        utils = self._deepspeed.utils
        with quiet():
            if self._config.zero_stage == 3:
                return self._optimizer._fp32_state_allgather(parameter, self._share(parameter, name))
            if name == "param":
                return utils.safe_get_full_fp32_param(parameter)
            return utils.safe_get_full_optimizer_state(parameter, name)

    def set_state(self, parameter: torch.nn.Parameter, name: str, value: Tensor) -> None:
        """Set what :meth:`gather_state` gathers; each rank keeps its share of ``value``. After the last one of a pass,
        :meth:`put_back`."""
        if self._config.zero_stage == 3:  # DeepSpeed's own setter cannot cut what the ranks do not divide
            share = self._share(parameter, name)
            mine = value.flatten()[parallel_state.get_data_parallel_rank() * share.numel() :][: share.numel()]
            share.zero_()
            share[: mine.numel()].copy_(mine)
            self._is_changed = True
            return
        utils, value = self._deepspeed.utils, value.to(parameter.device)
        if name == "param":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, name)

    def put_back(self) -> None:
        """End a pass over the optimizer's state: what was brought from NVMe leaves the memory, and is written if it was
        changed."""
        if self._brought is not None:
            if self._is_changed:
                self._optimizer._optimizer_states_and_gradient_swap_out(self._brought)
            else:
                self._optimizer._release_swap_buffers(self._brought)
        self._brought, self._is_changed = None, False

    def _share(self, parameter: torch.nn.Parameter, name: str) -> Tensor:
        """This rank's share of a state at stage 3, a view."""
        sub_group, start, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        self._bring(sub_group)
        flat = self._flat_partitions()[sub_group]
        return (flat.detach() if name == "param" else self._adam.state[flat][name]).narrow(0, start, length)

    def _bring(self, sub_group: int) -> None:
        """Have the state of a sub-group in memory: of those on NVMe, this one alone."""
        if sub_group == self._brought or not self._is_on_nvme(sub_group):
            return
        self.put_back()
        self._optimizer._optimizer_states_and_gradient_swap_in(sub_group)
        self._brought = sub_group

    def _is_on_nvme(self, sub_group: int) -> bool:
        """Whether the state of a sub-group is offloaded there: less than 1 MiB of it stays in memory."""
        return self._config.zero_stage == 3 and self._optimizer._swappable_optimizer_subgroup(sub_group)

    @property
    def num_updates(self) -> int:
        """Updates that the moments have seen."""
        return max((int(state["step"]) for state in self._adam.state.values()), default=0)

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(float(number))

    def close(self) -> None:
        """Give back hooks, buffers and threads, and let DeepSpeed forget this run's process groups."""
        self._end_transfers()
        self._engine.destroy()
        del self._engine, self._optimizer
        gc.collect()
        self._deepspeed.utils.groups._release_process_group_references()
        self._deepspeed.comm.comm.cdb = None
        # numbers that ranks compare, which would differ if one of them has had more models than another
        self._deepspeed.zero.Init.param_id = 0
        offload = self._deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload
        offload._register_deepspeed_module.__defaults__[0][0] = 0

    def _make_moments(self) -> None:
        """Make the moments now instead of at the first update: a run may be saved or resumed before."""
        for sub_group, flat in enumerate(self._flat_partitions()):
            self._bring(sub_group)
            self._is_changed = True
            self._adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        self.put_back()
        if self._config.zero_stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's shares of the float32 weights, one of each group (stage 3: of each sub-group)."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return next(getattr(self._optimizer, name) for name in names if hasattr(self._optimizer, name))

    def _check_files(self) -> None:
        """Check that what lies on NVMe was written: DeepSpeed does not. After the first step files are written over."""
        if self._swap_folder is not None:
            self._swap_folder.check_written(self._files())

    def _end_transfers(self) -> None:
        """Wait for what is on its way to files or from there: an operator that ends before it aborts the process."""
        if self._config.offload_param == "nvme":
            parameter: Any = next(self._module.parameters())
            parameter.nvme_swapper.synchronize_reads()
            parameter.nvme_swapper.synchronize_writes()
        if self._config.offload_optimizer == "nvme":
            swapper = self._optimizer.optimizer_swapper
            if swapper.gradient_swapper.has_buffers():
                swapper.flush_gradients()

    def _files(self) -> Iterator[tuple[Path, int]]:
        """The files of this rank and the bytes of each."""
        if self._config.offload_param == "nvme":
            parameter: Any  # with what DeepSpeed has given it
            for parameter in self._module.parameters():
                share = parameter.ds_tensor
                if share.final_location == "nvme":
                    yield Path(parameter.nvme_swapper.get_path(parameter)), share.ds_numel * share.element_size()
        swapper = self._optimizer.optimizer_swapper
        if swapper is None:
            return
        self._end_transfers()
        for info in swapper.swap_params_info.values():
            for path in info.get_swap_paths():
                yield Path(path), info.numel() * swapper.swap_element_size
            for gradient in info.swapped_gradients.values():
                yield Path(gradient.path), gradient.length * swapper.swap_element_size
