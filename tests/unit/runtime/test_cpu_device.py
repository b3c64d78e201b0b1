"""megatron-core sees the CPU (or meta) as its CUDA device; everybody else sees the torch that is there."""

import importlib
import inspect
import sys
import types

import pytest
import torch
from harness import run_ranks
from megatron.core import parallel_state, utils
from megatron.core.inference import communication_utils
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.moe import moe_utils

from megavlm.runtime import cpu_device, current_device
from megavlm.runtime.megatron_patches import MODULE_PATCHES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is installed where there is CUDA")


def _as_megatron(expression: str, **names: object) -> object:
    """Evaluate an expression as code of a megatron.core module would."""
    module = types.ModuleType("megatron.core.somewhere")
    module.__dict__.update(names)
    exec(f"def evaluate(): return {expression}", module.__dict__)
    return module.__dict__["evaluate"]()


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.zeros(1).cuda(),
        lambda: torch.nn.Linear(1, 1).cuda(),
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.cuda.current_device(),
        lambda: torch.cuda.synchronize(),
    ],
)
def test_outside_megatron_cuda_is_still_missing(call: types.FunctionType) -> None:
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        call()


def test_outside_megatron_torch_is_unchanged() -> None:
    assert not torch.cuda.is_available()
    assert not torch.cuda.is_initialized()
    assert type(torch.zeros(1).type()) is str
    assert torch.zeros(1).type() != "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_megatron_sees_the_cpu_as_current_device() -> None:
    assert utils.torch is not torch
    assert utils.torch.cuda.current_device() == torch.device("cpu") == current_device()
    assert utils.torch.float32 is torch.float32
    assert utils.torch.nn is torch.nn
    assert not utils.torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 1)])
@pytest.mark.parametrize("name", cpu_device._FACTORIES)
def test_factories_of_megatron_build_on_the_view_device(name: str, device: object) -> None:
    argument = torch.ones(2) if name.endswith("_like") else [2.0] if name == "tensor" else 2
    extra = (1.0,) if name == "full" else ()
    argument = (2,) if name == "full" else argument
    factory = getattr(utils.torch, name)
    assert factory(argument, *extra, device=device).device.type == "cpu"
    with cpu_device.view_device("meta"):
        assert factory(argument, *extra, device=device).device.type == "meta"
    assert factory(argument, *extra, device="cpu").device.type == "cpu"


def test_methods_called_by_megatron() -> None:
    tensor = torch.ones(2)
    assert _as_megatron("tensor.cuda()", tensor=tensor) is tensor
    assert _as_megatron("module.cuda()", module=torch.nn.Linear(1, 1)).weight.device.type == "cpu"
    for name, dtype in (("Float", torch.float32), ("BFloat16", torch.bfloat16), ("Half", torch.float16)):
        kind = _as_megatron("tensor.type()", tensor=tensor.to(dtype))
        assert kind == f"torch.cuda.{name}Tensor"
        assert kind in {f"torch.{name}Tensor"}
        assert kind != "torch.cuda.DoubleTensor"
    assert _as_megatron("tensor.type(dtype)", tensor=tensor, dtype=torch.float64).dtype == torch.float64


def test_install_again_changes_the_device_only() -> None:
    finders, cuda = list(sys.meta_path), torch.Tensor.cuda
    cpu_device.install("meta")
    assert current_device() == torch.device("meta") == utils.torch.cuda.current_device()
    cpu_device.install("cpu")
    assert current_device() == torch.device("cpu")
    assert sys.meta_path == finders
    assert torch.Tensor.cuda is cuda


def test_view_device_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), cpu_device.view_device("meta"):
        raise KeyError
    assert current_device() == torch.device("cpu")


def test_install_refuses_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="device='tpu': is not one of cpu, meta"):
        cpu_device.install("tpu")


def test_install_refuses_a_machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"device='cpu': this machine has 4 CUDA device\(s\)"):
        cpu_device.install("cpu")


def test_install_after_megatron_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_device, "_view_device", None)
    with pytest.raises(RuntimeError, match=r"modules of megatron\.core were imported before .* Import megavlm first"):
        cpu_device.install("cpu")


def test_without_a_view_the_device_is_this_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_device, "_view_device", None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert current_device() == torch.device("cuda", 3)
    with pytest.raises(RuntimeError, match="megatron-core sees CUDA here"), cpu_device.view_device("meta"):
        pass


@pytest.mark.parametrize("name", MODULE_PATCHES)
def test_patched_modules_exist_and_keep_their_source(name: str) -> None:
    module = importlib.import_module(f"megatron.core.{name}")
    assert "import" in inspect.getsource(module)


# ---- single patches --------------------------------------------------------------------------------------------------


def test_fork_of_the_rng_tracker_has_its_own_stream_and_restores_the_other() -> None:
    tracker = parallel_random.CudaRNGStatesTracker()
    tracker.add("dropout", 7)
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    with tracker.fork("dropout"):
        forked = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
    with tracker.fork("dropout"):
        assert not torch.equal(torch.rand(3), forked)  # the stream goes on
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), forked)


def test_recompute_without_output_is_not_fp8() -> None:
    assert not parallel_random.CheckpointWithoutOutput().fp8


def test_jit_fuser_leaves_functions_as_they_are() -> None:
    from_jit = importlib.import_module("megatron.core.jit").jit_fuser
    assert from_jit(_as_megatron) is _as_megatron


def test_moe_split_sizes_become_numpy_when_asked() -> None:
    sizes = torch.tensor([3, 5])
    assert moe_utils.maybe_move_tensor_to_cpu(sizes, as_numpy=True).tolist() == [3, 5]
    assert not torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(sizes, as_numpy=True))
    assert moe_utils.maybe_move_tensor_to_cpu(sizes) is sizes
    assert moe_utils.te_general_gemm is None


def test_inference_sends_cpu_tensors_but_not_nothing() -> None:
    communication_utils._is_cuda_contiguous(torch.ones(2))
    with pytest.raises(AssertionError):
        communication_utils._is_cuda_contiguous(torch.ones(2, 2).t())
    with pytest.raises(AssertionError):
        communication_utils._is_cuda(None)


def _gather_unequal() -> torch.Tensor:
    parallel_state.initialize_model_parallel(2)
    rank = torch.distributed.get_rank()
    piece = torch.arange(4.0).view(2, 2)[: rank + 1] + 10 * rank
    group = parallel_state.get_tensor_model_parallel_group()
    return mappings._gather_along_first_dim(piece, group, output_split_sizes=[1, 2])


def test_gather_of_unequal_pieces() -> None:
    expected = torch.tensor([[0.0, 1.0], [10.0, 11.0], [12.0, 13.0]])
    for gathered in run_ranks(_gather_unequal, 2):
        assert torch.equal(gathered, expected)
