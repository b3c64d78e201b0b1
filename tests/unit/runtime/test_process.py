"""Start and end of a process."""

import os

import pytest
import torch
import torch.distributed
from megatron.core import parallel_state

from megavlm.runtime import process as process_module
from megavlm.runtime.process import process, start, stop

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    stop(clean=False)


def test_a_single_process_needs_no_launcher() -> None:
    with process(num_threads=1) as me:
        assert (me.rank, me.world_size, me.local_rank, me.device.type) == (0, 1, 0, "cpu")
        assert torch.distributed.get_backend() == me.backend == "gloo"
        parallel_state.initialize_model_parallel()
        total = torch.ones(1)
        torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        assert total.item() == 1
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_launcher_variables_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with process() as me:
        assert me.local_rank == 2
        assert "MASTER_PORT" in os.environ


def _fail_with_groups() -> None:
    parallel_state.initialize_model_parallel()
    raise ZeroDivisionError


def test_everything_ends_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), process():
        _fail_with_groups()
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_stop_without_start_does_nothing() -> None:
    stop()
    stop(clean=False)


def test_start_twice_is_an_error() -> None:
    start()
    with pytest.raises(RuntimeError, match=r"start\(\) was called twice"):
        start()


WRONG = [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4: RANK is not set"),
    ({"RANK": "1", "WORLD_SIZE": "4"}, "RANK=1: MASTER_ADDR, MASTER_PORT is missing of RANK"),
    (
        {"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "RANK=4: must lie between 0 and WORLD_SIZE - 1 = 3",
    ),
]


@pytest.mark.parametrize(("variables", "message"), WRONG)
def test_wrong_launcher_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start()
    assert not torch.distributed.is_initialized()


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="timeout_minutes=0: must be above 0"):
        start(timeout_minutes=0)
    with pytest.raises(ValueError, match="num_threads=0: must be at least 1"):
        start(num_threads=0)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "current_device", lambda: torch.device("cuda", 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(process_module, "read_launcher", lambda: (2, 4, 2))
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2: this node has 2 CUDA device\(s\)"):
        start()


def test_cuda_build_without_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(process_module, "warn_once", said.append)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with process():
        assert said == ["torch was built for CUDA 12.9 but finds no GPU: running on the CPU"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # asked for: nothing to say
    with process():
        assert len(said) == 1
