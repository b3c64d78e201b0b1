"""One DeepSpeed engine around a module: the only file that knows DeepSpeed.

Written against DeepSpeed 0.19.8. What of it is not public is used here alone: the flat partitions of the optimizers,
and the groups that DeepSpeed remembers beyond the life of a process group.
"""

import gc
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megavlm.engines.deepspeed.config import DeepSpeedEngineConfig
from megavlm.runtime import current_device

_INSTALL = "DS_BUILD_OPS=0 pip install -c constraints.txt -r requirements-deepspeed.txt"


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
        self, module: torch.nn.Module, adam: torch.optim.AdamW, config: DeepSpeedEngineConfig, *, clip_grad: float
    ) -> None:
        """Share out the state of a module. Its weights are as they are to begin with, and the moments are zero.

        Args:
            module: with weights in the run's precision.
            adam: of its parameters that train; works on shares of them from now on.
            config: what is shared, and where it is kept.
            clip_grad: largest global gradient norm; 0: no clipping.

        Raises:
            ValueError: DeepSpeed is not installed, or cannot offload as it is asked to.
        """
        self._config = config
        self._adam = adam
        self._deepspeed = _import_deepspeed()
        if "nvme" in (config.offload_optimizer, config.offload_param):
            self.check_nvme()
        with _quiet():
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=module,
                optimizer=adam,
                config=config.deepspeed_settings(clip_grad=clip_grad),
                mpu=ModelParallelUnit(),
                dist_init_required=False,
            )
        if config.offload_optimizer != "nvme":
            self._make_moments()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        with _quiet():
            return self._engine(*args, **kwargs)

    def check_nvme(self) -> None:
        """Check that DeepSpeed can read and write files beside computing.

        Raises:
            ValueError: its operator for that cannot be built here.
        """
        builder = self._deepspeed.ops.op_builder.AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            raise ValueError(
                f"engine.nvme_path={self._config.nvme_path}: DeepSpeed's async_io operator cannot be built here: "
                "libaio is missing, or a C++ compiler. apt-get install libaio-dev g++, or offload to cpu."
            )

    # ---- steps -------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a micro-batch to those of the step.

        Args:
            loss: 0-d. The gradients of the ranks are averaged.
            is_last: whether it is the last micro-batch of the step.
        """
        with _quiet():
            self._engine.set_gradient_accumulation_boundary(is_last)
            self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        """Clip, update, forget the gradients. Returns the global gradient norm, and whether the weights were updated:
        they are not if it is not finite."""
        with _quiet():
            self._engine.step()
        if self._optimizer.overflow:
            return float("nan"), False
        return float(self._engine.get_global_grad_norm()), True

    # ---- state -------------------------------------------------------------------------------------------------------

    def gather_weight(self, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter's whole value, in a tensor that stays valid until the next call."""
        if self._config.zero_stage < 3:
            return parameter.detach()
        with _quiet(), self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def gather_state(self, parameter: torch.nn.Parameter, name: str) -> Tensor:
        """The whole ``param``, ``exp_avg`` or ``exp_avg_sq`` of a parameter that trains, float32."""
        utils = self._deepspeed.utils
        with _quiet():
            if name == "param":
                return utils.safe_get_full_fp32_param(parameter)
            return utils.safe_get_full_optimizer_state(parameter, name)

    def set_state(self, parameter: torch.nn.Parameter, name: str, value: Tensor) -> None:
        """Set what :meth:`gather_state` gathers; each rank keeps its share of ``value``."""
        utils, is_weight = self._deepspeed.utils, name == "param"
        if self._config.zero_stage < 3:
            value = value.to(parameter.device)
            if is_weight:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, name)
            return
        # DeepSpeed's own setter of whole values cannot cut those whose size the ranks do not divide
        like = utils.safe_get_local_fp32_param(parameter)
        mine = value.flatten()[parallel_state.get_data_parallel_rank() * like.numel() :][: like.numel()]
        share = torch.zeros_like(like)
        share.view(-1)[: mine.numel()] = mine.to(share.device)
        if is_weight:
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            utils.safe_set_local_optimizer_state(parameter, share, name)

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
        for flat in self._flat_partitions():
            self._adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        if self._config.zero_stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's shares of the float32 weights, one of each group (stage 3: of each sub-group)."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return next(getattr(self._optimizer, name) for name in names if hasattr(self._optimizer, name))


def _import_deepspeed() -> Any:
    """Import DeepSpeed so that it neither compiles anything nor talks.

    Raises:
        ValueError: it is not installed.
    """
    device = current_device()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # launchers set it; a single process has none
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"engine.kind=deepspeed: DeepSpeed is not installed ({error}). {_INSTALL}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    compatible: Mapping[str, bool] = deepspeed.ops.__compatible_ops__
    if compatible.get("deepspeed_shm_comm"):  # on CPUs it would be compiled at every first start, a minute or two
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _quiet(warnings.catch_warnings):  # noqa: N801  it is used like contextlib's
    """A block in which DeepSpeed may use what torch has deprecated."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", FutureWarning)
