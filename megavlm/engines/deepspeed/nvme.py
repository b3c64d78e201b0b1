"""The folder of one process on a local disk, for what DeepSpeed offloads to NVMe.

DeepSpeed 0.19.8 names its files by rank alone, leaves them behind, and does not ask whether a write came through
(``csrc/aio/common/deepspeed_aio_common.cpp`` drops what ``io_pgetevents`` returns of each block). So every process has
a folder of its own that ends with it, room is looked for before anything is written, and files are looked at after.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megavlm.engines.deepspeed.config import DeepSpeedEngineConfig

_PREFIX = "megavlm_rank"
_CAP_IPC_LOCK = 14  # linux/capability.h


class SwapFolder:
    """A folder that its process holds a lock on: one without a lock was left by a process that was killed."""

    def __init__(self, nvme_path: Path, rank: int) -> None:
        """Make the folder, and remove those that were left.

        Args:
            nvme_path: where; made if it is not there.
            rank: of this process, for its name.

        Raises:
            ValueError: the disk cannot be written to, or not as DeepSpeed does.
        """
        self._root = nvme_path
        self.path: Path | None = None
        self._lock = -1
        try:
            nvme_path.mkdir(parents=True, exist_ok=True)
            with _locked(nvme_path):
                _remove_left(nvme_path)
                self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{rank}_", dir=nvme_path))
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            _write_page(self.path / "probe")
        except OSError as error:
            self.remove()
            raise ValueError(f"engine.nvme_path={nvme_path}: {_reason(error)}") from None

    def check_room(self, num_bytes: int) -> None:
        """Check that the disk has room for what all ranks of this machine will write. Collective over all ranks.

        Args:
            num_bytes: of this rank, at most.

        Raises:
            ValueError: it has not; says both numbers.
        """
        assert self.path is not None, "it is removed"
        disk = (socket.gethostname(), os.stat(self.path).st_dev)
        asked: list[tuple[tuple[str, int], int]] = [(disk, 0)] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(asked, (disk, num_bytes))
        needed = sum(number for other, number in asked if other == disk)
        free = shutil.disk_usage(self.path).free
        torch.distributed.barrier()  # nobody writes before all have looked
        if free < needed:
            self.remove()
            raise ValueError(
                f"engine.nvme_path={self._root}: has {free / 1e9:.3f} GB free, and the ranks of this machine offload "
                f"up to {needed / 1e9:.3f} GB. Give a folder on a larger disk, offload to cpu, or use more "
                "machines."
            )

    def check_written(self, files: Iterable[tuple[Path, int]]) -> None:
        """Check that files are as long as they were written.

        Args:
            files: and the bytes that were written.

        Raises:
            ValueError: one is shorter; says both numbers.
        """
        for path, num_bytes in files:
            found = path.stat().st_size if path.exists() else 0
            if found < num_bytes:
                raise ValueError(
                    f"engine.nvme_path={self._root}: {found} of {num_bytes} bytes were written of {path.name}: the "
                    "disk has filled up, or fails. Make room there, or offload to cpu."
                )

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def check_lockable(num_bytes: int) -> None:
    """Check that this process may lock memory: DeepSpeed's buffers are, and it goes on with none where they cannot.

    Args:
        num_bytes: of the buffers, at most.

    Raises:
        ValueError: the limit is below; says both numbers.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY or limit >= num_bytes or _may_lock_anything():
        return
    raise ValueError(
        f"engine.nvme_path: buffers of up to {num_bytes / 1e9:.3f} GB are locked in memory, and `ulimit -l` allows "
        f"{limit / 1e9:.3f} GB. Raise it (ulimit -l unlimited; docker run --ulimit memlock=-1), or lower "
        "engine.sub_group_size."
    )


def _may_lock_anything() -> bool:
    """Whether the process has the capability CAP_IPC_LOCK, as root mostly has."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    [effective] = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")]
    return bool(int(effective, 16) & (1 << _CAP_IPC_LOCK))


def num_bytes_on_nvme(module: torch.nn.Module, config: DeepSpeedEngineConfig) -> int:
    """What a rank will offload to NVMe, at most: small tensors stay in memory.

    Args:
        module: whole, with ``requires_grad`` set.
        config: what is offloaded.
    """
    num_bytes = 0
    for parameter in module.parameters():
        mine = num_mine(parameter)
        if config.offload_param == "nvme":
            num_bytes += mine * config.dtype.itemsize
        if config.offload_optimizer == "nvme" and parameter.requires_grad:
            num_bytes += mine * 4 * 4  # float32: master weight, two moments, gradient
    return num_bytes


def num_bytes_of_buffers(module: torch.nn.Module, config: DeepSpeedEngineConfig) -> int:
    """What a rank holds in locked memory to offload to NVMe, at most; as :func:`num_bytes_on_nvme`."""
    shares = [num_mine(parameter) for parameter in module.parameters()]
    trained = sum(num_mine(parameter) for parameter in module.parameters() if parameter.requires_grad)
    num_bytes = 0
    if config.offload_param == "nvme":
        num_bytes += 5 * max(shares) * config.dtype.itemsize
    if config.offload_optimizer == "nvme":
        num_bytes += 5 * min(trained, config.sub_group_size + max(shares)) * 4
    return num_bytes


def num_mine(parameter: torch.nn.Parameter) -> int:
    """Elements of a data-parallel rank's share."""
    return -(-parameter.numel() // parallel_state.get_data_parallel_world_size())


class AlignedGradients:
    """Reads the gradients of a sub-group from their files into their places.

    In place of a method of DeepSpeed's swapper (``swap_tensor/partitioned_optimizer_swapper.py``,
    ``_swap_in_pinned_gradients``) that reads straight into the places: where one does not begin at a multiple of the
    disk's block, the system refuses the read, DeepSpeed does not look, and the step takes what lay there before.
    """

    def __init__(self, swapper: Any) -> None:
        """Take the method's place.

        Args:
            swapper: with a buffer more than a sub-group's weights, moments and gradients fill.
        """
        self._swapper = swapper
        swapper._swap_in_pinned_gradients = self

    def __call__(self, aio_handle: Any, parameter: Any, gradient_tensor: torch.Tensor) -> None:
        """Fill a sub-group's gradients.

        Args:
            aio_handle: DeepSpeed's operator.
            parameter: the sub-group's float32 weights.
            gradient_tensor: as many elements.
        """
        buffers = self._swapper.swap_buffer_manager
        [buffer] = buffers.allocate(num_elems=self._swapper.largest_numel, count=1, dtype=gradient_tensor.dtype)
        for gradient in self._swapper.swap_params_info[parameter.ds_id].swapped_gradients.values():
            aligned = buffer.narrow(0, 0, gradient.length)
            if aio_handle.async_pread(aligned, gradient.path, 0) != 0 or aio_handle.wait() != 1:
                raise RuntimeError(f"engine.nvme_path: {gradient.path} cannot be read. Is the disk failing?")
            gradient_tensor.narrow(0, gradient.offset, gradient.length).copy_(aligned)
        buffers.free([buffer])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only process that makes or removes folders in one."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove_left(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(PermissionError):  # of another user
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # of a run that is going on
            else:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _write_page(path: Path) -> None:
    """Write as DeepSpeed does, past the file cache, from aligned memory."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.write(file, page)
    finally:
        os.close(file)
    path.unlink()


def _reason(error: OSError) -> str:
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "is a file, or lies under one. Give a folder on a local disk."
    if error.errno == errno.EINVAL:
        return (
            "its file system does not take writes past the file cache (O_DIRECT), which DeepSpeed makes. Give a folder "
            "on a local disk."
        )
    return f"cannot be written to ({error.strerror}). Give a folder on a local disk where this user may write."
