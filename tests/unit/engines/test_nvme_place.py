"""The folder of a rank for what is offloaded to NVMe: what it takes from others, leaves behind, and refuses."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megavlm.engines.deepspeed import library, nvme
from megavlm.engines.deepspeed.nvme import SwapFolder
from megavlm.runtime.process import process


def test_a_folder_ends_with_its_process(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    mine, other = SwapFolder(root, 0), SwapFolder(root, 1)
    assert mine.path is not None
    assert other.path is not None
    assert sorted(path.name[:14] for path in root.iterdir()) == ["megavlm_rank0_", "megavlm_rank1_"]
    assert list(mine.path.iterdir()) == [], "what was tried out is removed"
    (mine.path / "weights.swp").write_bytes(b"1234")
    mine.remove()
    mine.remove()
    assert list(root.iterdir()) == [other.path]
    other.remove()


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, of_others = tmp_path / "megavlm_rank3_abcdefgh", tmp_path / "zero_stage_3"
    for folder in (left, of_others):
        folder.mkdir()
        (folder / "1.tensor.swp").write_bytes(b"1234")
    in_use = SwapFolder(tmp_path, 0)
    assert sorted(tmp_path.iterdir()) == sorted([in_use.path, of_others])
    of_the_same_rank = SwapFolder(tmp_path, 0)  # of another run
    assert sorted(tmp_path.iterdir()) == sorted([in_use.path, of_the_same_rank.path, of_others])
    in_use.remove()
    of_the_same_rank.remove()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_its_place_is_named(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match=r"engine\.nvme_path=.*file.*: is a file, or lies under one\. Give a folder"):
        SwapFolder(tmp_path / "file" / below, 0)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EINVAL, r"its file system does not take writes past the file cache \(O_DIRECT\)"),
        (errno.EROFS, r"cannot be written to \(Read-only file system\)\. Give a folder on a local disk where"),
        (errno.EACCES, r"cannot be written to \(Permission denied\)"),
    ],
)
def test_a_disk_that_is_not_written_to_is_named(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(ValueError, match=rf"engine\.nvme_path={tmp_path}: {message}"):
        SwapFolder(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with process():
        folder = SwapFolder(tmp_path, 0)
        folder.check_room(4096)
        with pytest.raises(ValueError, match=r"GB free, and the ranks of this machine offload up to 1000000\.000 GB"):
            folder.check_room(10**15)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_written_in_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "0_4.tensor.swp").write_bytes(bytes(4096))
    folder = SwapFolder(tmp_path, 0)
    folder.check_written([(tmp_path / "0_4.tensor.swp", 4000)])
    with pytest.raises(ValueError, match=r"4096 of 8192 bytes were written of 0_4\.tensor\.swp: the disk has filled"):
        folder.check_written([(tmp_path / "0_4.tensor.swp", 8192)])
    with pytest.raises(ValueError, match=r"0 of 1 bytes were written of nowhere"):
        folder.check_written([(tmp_path / "nowhere", 1)])
    folder.remove()


def test_memory_that_cannot_be_locked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "_may_lock_anything", lambda: False)
    monkeypatch.setattr("resource.getrlimit", lambda which: (8 << 20, 8 << 20))
    nvme.check_lockable(8 << 20)
    with pytest.raises(ValueError, match=r"up to 20\.000 GB are locked in memory, and `ulimit -l` allows 0\.008 GB"):
        nvme.check_lockable(20 * 10**9)
    monkeypatch.setattr(nvme, "_may_lock_anything", lambda: True)
    nvme.check_lockable(20 * 10**9)
    monkeypatch.undo()
    nvme._may_lock_anything()  # it can read what this kernel writes


class FakeBuilder:
    def __init__(self, is_compatible: bool) -> None:
        self._is_compatible = is_compatible

    def is_compatible(self, verbose: bool) -> bool:
        return self._is_compatible

    def load(self, verbose: bool) -> None:
        raise RuntimeError("Error building extension 'async_io'\n")


@pytest.mark.parametrize(
    ("is_compatible", "message"),
    [
        (
            False,
            r"engine\.nvme_path=/scratch: .*cannot be compiled here: .*apt-get install libaio-dev g\+\+, or offload",
        ),
        (True, r"/scratch: .* could not be compiled: Error building extension 'async_io'\. Mend what"),
    ],
)
def test_an_operator_that_cannot_be_compiled_is_one_line(
    is_compatible: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed = type("deepspeed", (), {})
    deepspeed.ops = deepspeed.op_builder = deepspeed  # type: ignore[attr-defined]
    deepspeed.AsyncIOBuilder = staticmethod(lambda: FakeBuilder(is_compatible))  # type: ignore[attr-defined]
    monkeypatch.setattr(library, "import_deepspeed", lambda: deepspeed)
    with pytest.raises(ValueError, match=message):
        library.load_async_io(Path("/scratch"))
