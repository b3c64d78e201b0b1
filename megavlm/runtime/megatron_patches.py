"""What must change inside single megatron.core modules when there is no CUDA. Applied by the import hook only.

Each patch is one function that gets the freshly imported module. Above it: the sites that need it, and what happens
without it. Written against megatron-core 0.16.1. Imports nothing of the project and no megatron.core.
"""

import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch


# Every @jit_fuser function (fused bias, swiglu, softmax ...). Without it: torch.compile, which needs a C++ compiler and
# takes longer than a small model's whole run.
def disable_jit_fuser(module: types.ModuleType) -> None:
    """``megatron.core.jit``: leave functions as they are."""
    module.disable_jit_fuser()


# The RNG tracker's fork() and recompute. Without it: they reach into torch.cuda.default_generators through functions
# imported by name; getting fails, and setting is queued until CUDA starts, that is never: wrong dropout streams.
def use_cpu_generator(module: types.ModuleType) -> None:
    """``tensor_parallel.random``: the device's generator is torch's default one."""

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    module.__dict__["_get_cuda_rng_state"] = get_state
    module.__dict__["_set_cuda_rng_state"] = set_state
    # fork() warns when the CPU generator moved inside it, as it must here, once per dropout
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


# Recompute of "layernorm" and "moe_act" without Transformer Engine, on GPUs too: the default fp8=False is read as
# "fp8 is not None", that is as on. Without it: NameError FP8GlobalStateManager.
def default_to_no_fp8(module: types.ModuleType) -> None:
    """``tensor_parallel.random``: CheckpointWithoutOutput() means no fp8."""
    module.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


# The alltoall dispatcher with expert TP > 1 and EP > 1 gathers pieces of unequal length, which gloo cannot.
# Without it: RuntimeError "invalid tensor size".
def gather_unequal_pieces(module: types.ModuleType) -> None:
    """``tensor_parallel.mappings``: gather pieces of unequal length with an all-to-all."""
    gather_equal = module._gather_along_first_dim

    def gather(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if not output_split_sizes or len(set(output_split_sizes)) == 1:
            return gather_equal(input_, group, output_split_sizes, use_global_buffer)
        world_size = group.size()
        output = input_.new_empty([sum(output_split_sizes), *input_.shape[1:]])
        copies = torch.cat([input_] * world_size)
        torch.distributed.all_to_all_single(
            output, copies, list(output_split_sizes), [input_.shape[0]] * world_size, group=group
        )
        return output

    module.__dict__["_gather_along_first_dim"] = gather


# The router's linear without Transformer Engine, on GPUs too: the name is only imported with it.
# Without it: NameError te_general_gemm in RouterGatingLinearFunction.
def define_te_gemm(module: types.ModuleType) -> None:
    """``transformer.moe.moe_utils``: there is no Transformer Engine GEMM."""
    module.__dict__.setdefault("te_general_gemm", None)


# token_dispatcher._maybe_dtoh_and_synchronize asks for numpy split sizes, and gets them for CUDA tensors only.
# Without it: TypeError in all_to_all_single when EP > 1.
def move_splits_to_numpy(module: types.ModuleType) -> None:
    """``transformer.moe.moe_utils``: CPU tensors become numpy arrays too when asked."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.__dict__["maybe_move_tensor_to_cpu"] = move


# The static inference engine over pipeline stages. Without it: AssertionError.
def accept_cpu_tensors(module: types.ModuleType) -> None:
    """``inference.communication_utils``: tensors that are sent need not be on CUDA."""

    def check(tensor: torch.Tensor | None) -> None:
        assert tensor is not None

    module.__dict__["_is_cuda"] = check


MODULE_PATCHES: dict[str, tuple[Callable[[types.ModuleType], None], ...]] = {
    "jit": (disable_jit_fuser,),
    "tensor_parallel.random": (use_cpu_generator, default_to_no_fp8),
    "tensor_parallel.mappings": (gather_unequal_pieces,),
    "transformer.moe.moe_utils": (define_te_gemm, move_splits_to_numpy),
    "inference.communication_utils": (accept_cpu_tensors,),
}
"""Module under ``megatron.core`` -> its patches."""
