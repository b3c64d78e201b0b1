"""Writes a checkpoint of weights that nobody holds: each tensor is asked for when it is its turn to be written."""

import io
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from megavlm.checkpoint import durable
from megavlm.checkpoint.agreement import agreed
from megavlm.checkpoint.folder import RELEASE, Iteration, RunFolder
from megavlm.checkpoint.layout import LAYOUT_NAME, CheckpointInfo, Layout
from megavlm.checkpoint.manifest import write_manifest
from megavlm.checkpoint.pickles import COMMON_NAME, read_metadata
from megavlm.checkpoint.writer import EXTRA_NAME

_ONE_PROCESS = Layout(
    world_size=1,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    context_parallel_size=1,
    expert_model_parallel_size=1,
    device="cpu",
)


@dataclass(frozen=True)
class ReleaseTensor:
    """What has to be known of a tensor before it is there."""

    shape: tuple[int, ...]
    """Full shape, padding not counted."""
    padded_shape: tuple[int, ...]
    """Shape that a model which is not split over ranks gives it (see :func:`megavlm.models.weights.mark_padded`)."""
    dtype: torch.dtype


@dataclass(frozen=True)
class RunState:
    """What makes a checkpoint, the optimizer's tensors among its own, one that a run is resumed from."""

    iteration: int
    """Steps done."""
    layout: Layout
    """Of the ranks whose random number generators are among the files (``rng/rank_00000.json`` ...)."""
    common: Mapping[str, Any]
    """megatron-core's state without tensors: the optimizer's parameter groups."""
    extra: bytes
    """``extra.json``."""


_NO_RUN = RunState(0, _ONE_PROCESS, {}, b"{}\n")


def write_release(
    folder: RunFolder,
    tensors: Mapping[str, ReleaseTensor],
    read: Callable[[str], Tensor],
    files: Mapping[str, bytes | Path],
    run: RunState | None = None,
) -> Path:
    """Write ``release/``: weights without a step, which start other runs. In one process, without a process group.

    The memory that it takes is that of one tensor, and of the one before it.

    Args:
        folder: the run folder; made if need be.
        tensors: checkpoint key -> what it holds.
        read: gives the full tensor of a key, without padding.
        files: name inside the checkpoint -> bytes, or path of a file to copy.
        run: writes ``iter_<step>/`` instead, which is resumed.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a tensor could not be read or is not what was announced, or the disk is full or may not be written.
    """
    name: Iteration = RELEASE if run is None else run.iteration
    with agreed(f"making a folder in {folder.path}"):
        written = folder.start_writing(name)
    try:
        with agreed(f"writing {written}"):
            _write_small_files(written, tensors, files, run or _NO_RUN)
            _write_tensors(written, tensors, read)
            save_config(CheckpointingConfig("torch_dist", 1), str(written))
            durable.sync(written / "metadata.json")
            num_written = len(read_metadata(written).storage_data)
            assert num_written == len(tensors), f"torch wrote {num_written} of {len(tensors)} tensors"
        write_manifest(written)
        return folder.publish(written, name)
    finally:
        shutil.rmtree(written, ignore_errors=True)  # it has got its name by now, unless something went wrong


class _AskingPlanner(DefaultSavePlanner):
    """Plans with tensors that hold nothing, and asks for each when the writer wants it."""

    def __init__(self, tensors: Mapping[str, ReleaseTensor], read: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Give the padded tensor of a key."""
        announced = self._tensors[index.fqn]
        tensor = self._read(index.fqn)
        found = (tuple(tensor.shape), tensor.dtype)
        assert found == (announced.shape, announced.dtype), f"{index.fqn} is {found}, and {announced} was announced"
        if announced.shape == announced.padded_shape:
            return tensor
        padded = tensor.new_zeros(announced.padded_shape)
        padded[tuple(slice(0, size) for size in announced.shape)] = tensor
        return padded


def _write_small_files(
    written: Path, tensors: Mapping[str, ReleaseTensor], files: Mapping[str, bytes | Path], run: RunState
) -> None:
    padded = {key: tensor.shape for key, tensor in tensors.items() if tensor.shape != tensor.padded_shape}
    durable.write_file(written / LAYOUT_NAME, CheckpointInfo(run.iteration, run.layout, padded).dump())
    durable.write_file(written / EXTRA_NAME, run.extra)
    buffer = io.BytesIO()
    torch.save(dict(run.common), buffer)  # a release has none, and megatron-core asks for the file all the same
    durable.write_file(written / COMMON_NAME, buffer.getvalue())
    for name, content in files.items():
        if isinstance(content, Path):
            durable.copy_file(content, written / name)
        else:
            durable.write_file(written / name, content)


def _write_tensors(written: Path, tensors: Mapping[str, ReleaseTensor], read: Callable[[str], Tensor]) -> None:
    state: dict[str, Any] = {
        key: torch.empty(tensor.padded_shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()
    }
    # torch's writer holds all that it writes into a file until that is closed: a file for each tensor
    writer = FileSystemWriter(str(written), single_file_per_rank=False, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            torch.distributed.checkpoint.save(
                state, storage_writer=writer, planner=_AskingPlanner(tensors, read), no_dist=True
            )
        except CheckpointException as error:
            cause = error.failures[0][0]
            raise cause if isinstance(cause, ValueError | OSError) else error from None
