"""The steps of writing one checkpoint, in their order. :mod:`save` takes them in one go, :mod:`asynchronous` in two.

A folder of a temporary name is filled: megatron-core's files (``__<rank>_<n>.distcp``, ``.metadata``, ``common.pt``,
``metadata.json``), the caller's, ``extra.json``, ``layout.json`` and ``rng/rank_<rank>.json``. The manifest comes last,
and then the folder gets its name. Until then nothing of the run folder has changed.
"""

import contextlib
import errno
import io
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter

from megavlm.checkpoint import durable
from megavlm.checkpoint.agreement import agreed, from_rank_0, gather, rank
from megavlm.checkpoint.folder import Iteration, RunFolder
from megavlm.checkpoint.layout import (
    LAYOUT_NAME,
    CheckpointInfo,
    Layout,
    drop_empty_moments,
    sharded_leaves,
    unpadded_shapes,
)
from megavlm.checkpoint.manifest import MANIFEST_NAME, list_files, write_manifest
from megavlm.checkpoint.pickles import COMMON_NAME, METADATA_NAME, read_metadata
from megavlm.checkpoint.rng import capture_rng
from megavlm.engines import MegatronEngine
from megavlm.runtime.log import LOGGER
from megavlm.runtime.sharding import sharding_metadata

EXTRA_NAME = "extra.json"
_OWN_NAMES = (MANIFEST_NAME, LAYOUT_NAME, EXTRA_NAME, METADATA_NAME, COMMON_NAME, "metadata.json", "rng")
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
# Of each rank, and of its files. torch loses what goes wrong in a second thread, and calls its file saved.
_NUM_THREADS = 1
_BYTES_AROUND = 1200

File = str | bytes | Path
"""A file of the caller's: its text, its bytes, or the path of a file or folder to copy."""


def rng_name(rank: int) -> str:
    """The file of one rank's random number generators."""
    return f"rng/rank_{rank:05d}.json"


class CheckpointWriter:
    """One checkpoint on its way to the disk. Every method is collective and raises on all ranks together."""

    def __init__(self, folder: RunFolder, iteration: Iteration, keep_last: int | None) -> None:
        self.iteration = iteration
        self._folder = folder
        self._keep_last = keep_last
        self._start = time.monotonic()
        self._written: Path | None = None
        self._num_bytes = 0  # of the tensors, over all ranks

    def prepare(
        self,
        engine: MegatronEngine,
        extra: Mapping[str, Any],
        files: Mapping[str, File],
        *,
        with_optimizer: bool,
    ) -> dict[str, Any]:
        """Make the folder, write everything but tensors, and return what is left to write: this rank's sharded part.

        Raises:
            ValueError: ``extra`` is not JSON, a file's name is not possible, or the folder cannot be written.
        """
        extra_text = ""
        with self._cleaned_up():
            with agreed("checking arguments"):
                extra_text = _to_json(extra)
                _check_names(files)
            doing = f"making a folder in {self._folder.path}"
            self._written = from_rank_0(doing, lambda: self._folder.start_writing(self.iteration))
            state = engine.sharded_state_dict(with_optimizer=with_optimizer)
            drop_empty_moments(state)
            self._num_bytes = sum(gather(_count_bytes(state)))
            shapes = {key: shape for part in gather(unpadded_shapes(state)) for key, shape in part.items()}
            with agreed(f"writing {self._written}"):
                if rank() == 0:
                    self._write_small_files(extra_text, files, shapes)
                durable.write_file(self._written / rng_name(rank()), json.dumps(capture_rng()).encode())
            return self._split(state)

    def write(self, sharded: dict[str, Any]) -> None:
        """Write the tensors, and wait until they are on the disk.

        megatron-core's writer starts a process for its results and one for each file, which takes seconds; the writer
        of torch that it is made from does the same in threads of this process.
        """
        assert self._written is not None, "prepare comes before write"
        grouped: dict[str, list[ShardedTensor | ShardedObject]] = defaultdict(list)
        for leaf in nested_values(sharded):
            if is_main_replica(leaf.replica_id):
                grouped[leaf.unique_key if isinstance(leaf, ShardedObject) else leaf.key].append(leaf)
        with self._cleaned_up(), agreed(f"writing {self._written}"):
            torch.distributed.checkpoint.save(
                mcore_to_pyt_state_dict(grouped),
                storage_writer=FileSystemWriter(str(self._written), thread_count=_NUM_THREADS),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    def write_later(self, sharded: dict[str, Any]) -> AsyncRequest:
        """Copy the tensors to the CPU; return what megatron-core's queue needs to write them in another process."""
        assert self._written is not None, "prepare comes before write_later"
        with self._cleaned_up(), agreed(f"writing {self._written}"):
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_NUM_THREADS)
            return strategy.async_save(sharded, self._written)

    def finish(self) -> Path:
        """After the tensors: write the manifest, give the folder its name, delete the oldest checkpoints."""
        assert self._written is not None, "prepare comes before finish"
        written = self._written
        with self._cleaned_up():
            with agreed(f"writing {written}"):
                if rank() == 0:
                    save_config(CheckpointingConfig("torch_dist", 1), str(written))
                    durable.sync(written / "metadata.json")
                    _check_all_there(written)
            write_manifest(written)
            target = from_rank_0(f"renaming {written}", lambda: self._folder.publish(written, self.iteration))
        seconds = time.monotonic() - self._start
        LOGGER.info("saved %s (%.1f MB in %.1f s)", target, self._num_bytes / 1e6, seconds)
        with agreed(f"deleting old checkpoints of {self._folder.path}"):
            if rank() == 0 and self._keep_last is not None:
                for step in self._folder.prune(self._keep_last, keep=self.iteration):
                    LOGGER.info("deleted %s: checkpoint.keep_last=%d", self._folder.checkpoint(step), self._keep_last)
        return target

    @contextlib.contextmanager
    def failing(self, doing: str) -> Iterator[None]:
        """A block of other people's collectives that belongs to this checkpoint: its errors are said as ours."""
        with self._cleaned_up(), agreed(doing):
            yield

    def _write_small_files(
        self, extra_text: str, files: Mapping[str, File], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        assert self._written is not None
        info = CheckpointInfo(self.iteration if isinstance(self.iteration, int) else 0, Layout.of_this_run(), shapes)
        durable.write_file(self._written / EXTRA_NAME, extra_text.encode())
        durable.write_file(self._written / LAYOUT_NAME, info.dump())
        for name, content in files.items():
            _write(self._written / name, content)

    def _split(self, state: dict[str, Any]) -> dict[str, Any]:
        """Write the part of the state that all ranks share; return the sharded part, each tensor on one rank only."""
        assert self._written is not None
        state["content_metadata"] = sharding_metadata()
        sharded: dict[str, Any] = {}
        with agreed(f"writing {self._written}"):
            sharded, common = save_preprocess(state)
            if rank() == 0:
                buffer = io.BytesIO()
                torch.save(common, buffer)
                durable.write_file(self._written / COMMON_NAME, buffer.getvalue())
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
            with agreed(f"writing {self._written}"):
                FullyParallelSaveStrategyWrapper(strategy, group).apply_saving_parallelization(sharded)
        return sharded

    @contextlib.contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Remove what was written if the block fails, and say why in words that help."""
        try:
            yield
        except ValueError as error:
            numbers = {number for number in gather(_error_number(error)) if number is not None}
            text = str(error)
            raise ValueError(from_rank_0("giving up", lambda: self._give_up(text, numbers))) from error

    def _give_up(self, text: str, error_numbers: set[int]) -> str:
        """Remove what was written; return what to tell. On rank 0."""
        untouched = "Checkpoints saved before are as they were."
        is_full = bool(error_numbers & durable.NO_SPACE)
        if self._written is not None and self._written.exists():
            still_to_write = self._num_bytes - sum(path.stat().st_size for path in self._written.rglob("*.distcp"))
            # the writer of torch hides the errno of a full disk now and then
            is_full = is_full or shutil.disk_usage(self._written).free < still_to_write
            shutil.rmtree(self._written, ignore_errors=True)
        if is_full:
            free = shutil.disk_usage(self._folder.path).free
            return (
                f"checkpoint.save={self._folder.path}: no space left on the disk: a checkpoint needs about "
                f"{self._num_bytes} bytes and {free} are free. Make room, or save elsewhere. {untouched}"
            )
        if error_numbers & _NOT_ALLOWED:
            return (
                f"checkpoint.save={self._folder.path}: may not be written ({text}). Choose another folder. {untouched}"
            )
        return f"{text} {untouched}"


def _to_json(extra: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(extra), indent=1) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra={sorted(extra)}: cannot be written as JSON ({error}). Keep to numbers and text."
        ) from None


def _check_names(files: Mapping[str, File]) -> None:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0] in _OWN_NAMES:
            raise ValueError(
                f"files={name!r}: is not a name for a file of a checkpoint: it must lie inside, and not be one of "
                f"{', '.join(_OWN_NAMES)}. Choose another."
            )


def _write(path: Path, content: File) -> None:
    if isinstance(content, Path) and content.is_dir():
        for source in sorted(content.rglob("*")):
            if source.is_file():
                durable.copy_file(source, path / source.relative_to(content))
    elif isinstance(content, Path):
        durable.copy_file(content, path)
    else:
        durable.write_file(path, content.encode() if isinstance(content, str) else content)


def _check_all_there(written: Path) -> None:
    """Rank 0 must see what all ranks wrote, and all that was to be written must have been."""
    metadata = read_metadata(written)
    num_planned = sum(len(getattr(entry, "chunks", (entry,))) for entry in metadata.state_dict_metadata.values())
    if len(metadata.storage_data) != num_planned:
        raise ValueError(
            f"{written}: {len(metadata.storage_data)} of {num_planned} tensors and objects were written. Save again."
        )
    unseen = sorted({info.relative_path for info in metadata.storage_data.values()} - set(list_files(written)))
    if unseen:
        raise ValueError(
            f"checkpoint.save={written.parent}: rank 0 does not see {len(unseen)} files that other ranks wrote, first "
            f"{unseen[0]}. Save on a file system that all nodes share."
        )


def _count_bytes(state: Any) -> int:
    """Bytes of the tensors that this rank answers for, and of what torch.save puts around each."""
    mine = [leaf for leaf in sharded_leaves(state) if is_main_replica(leaf.replica_id)]
    return sum((leaf.data.nbytes if isinstance(leaf.data, torch.Tensor) else 0) + _BYTES_AROUND for leaf in mine)


def _error_number(error: BaseException | None) -> int | None:
    """The errno at the root of an error; torch wraps the errors of all ranks, and its writer hides its own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if isinstance(error, CheckpointException):
            roots = [_error_number(cause) for cause, _ in error.failures.values()]
            return next((root for root in roots if root is not None), None)
        error = error.__cause__ or error.__context__
    return None
