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
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_PREFIX = "megavlm_rank"


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
                "data-parallel ranks."
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
