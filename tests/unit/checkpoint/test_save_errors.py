"""A save that fails says why, in one sentence, and leaves what was saved before."""

import errno
import pickle
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_model
import pytest
from harness import run_ranks

from megavlm.checkpoint import AsyncSaver, save_checkpoint
from megavlm.checkpoint.asynchronous import check_async_save
from megavlm.checkpoint.manifest import find_damage
from megavlm.checkpoint.pickles import read_metadata
from megavlm.checkpoint.writer import CheckpointWriter, RunFolder, _check_all_there

UNTOUCHED = "Checkpoints saved before are as they were."


def save_twice(folder: Path, asynchronous: bool, iteration: Any, extra: Any, files: Any) -> str:
    """Save step 1 as it should be, then another with the given arguments; return what was said."""
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST, with_optimizer=False)
    save_checkpoint(folder, 1, engine, with_optimizer=False)
    try:
        if asynchronous:
            saver = AsyncSaver()
            saver.save(folder, iteration, engine, extra, files, with_optimizer=False)
            saver.finish()
        else:
            save_checkpoint(folder, iteration, engine, extra, files, with_optimizer=False)
    except ValueError as error:
        return str(error)
    return "saved"


def said(folder: Path, asynchronous: bool = False, extra: Any = None, files: Any = None) -> str:
    return run_ranks(save_twice, 1, folder, asynchronous, 2, extra, files)[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 kB: one checkpoint fits (about 130 kB), two do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk(small_disk: Path, asynchronous: bool) -> None:
    text = said(small_disk / "run", asynchronous)
    expected = (
        rf"checkpoint.save={small_disk / 'run'}: no space left on the disk: a checkpoint needs about \d+ bytes and \d+ "
        rf"are free. Make room, or save elsewhere. {UNTOUCHED}"
    )
    assert re.fullmatch(expected, text), text
    assert sorted(path.name for path in (small_disk / "run").iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]
    assert find_damage(small_disk / "run" / "iter_0000001") is None


@pytest.mark.parametrize("room_kb", [4, 16, 32, 64, 100])
def test_disk_that_is_full_at_any_point(small_disk: Path, room_kb: int) -> None:
    (small_disk / "other").write_bytes(bytes((200 - room_kb) * 1024))
    text = run_ranks(save_first, 1, small_disk / "run")[0]
    assert "no space left on the disk" in text, text
    assert list((small_disk / "run").iterdir()) == []


def save_first(folder: Path) -> str:
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST, with_optimizer=False)
    try:
        save_checkpoint(folder, 1, engine, with_optimizer=False)
    except ValueError as error:
        return str(error)
    return "saved"


def test_disk_that_may_not_be_written(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    text = run_ranks(save_first, 1, small_disk / "run")[0]
    assert text.startswith(f"checkpoint.save={small_disk / 'run'}: may not be written (making a folder in"), text
    assert text.endswith(f"Choose another folder. {UNTOUCHED}")


def test_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    text = run_ranks(save_first, 1, tmp_path / "run")[0]
    assert text.startswith(f"checkpoint.save={tmp_path / 'run'}: may not be written"), text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"extra": {"a": object}}, "extra=['a']: cannot be written as JSON"),
        ({"files": {"../recipe.yaml": ""}}, "files='../recipe.yaml': is not a name for a file of a checkpoint"),
        ({"files": {"/tmp/recipe.yaml": ""}}, "files='/tmp/recipe.yaml': is not a name"),
        ({"files": {"manifest.json": ""}}, "files='manifest.json': is not a name"),
        ({"files": {"rng/mine": ""}}, "files='rng/mine': is not a name"),
        ({"files": {"": ""}}, "files='': is not a name"),
        ({"files": {"recipe.yaml": Path("/nowhere/recipe.yaml")}}, "No such file or directory: '/nowhere/recipe.yaml'"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict, expected: str) -> None:
    text = said(tmp_path, **arguments)
    assert expected in text
    assert text.endswith(UNTOUCHED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_quota_is_told_as_a_full_disk(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room, but not for this user."""

    def no_room(self: RunFolder, iteration: object) -> Path:
        raise OSError(number, "no room", str(self.path))

    monkeypatch.setattr(RunFolder, "start_writing", no_room)
    writer = CheckpointWriter(RunFolder(tmp_path), 1, None)
    with pytest.raises(ValueError, match="no space left on the disk"):
        writer.prepare(None, {}, {}, with_optimizer=False)  # type: ignore[arg-type]  # not reached


def test_asynchronous_saves_need_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.dist_checkpointing.strategies.filesystem_async.HAVE_PSUTIL", False)
    with pytest.raises(ValueError, match=r"checkpoint.async_save=True: megatron-core needs psutil for it"):
        check_async_save()


def test_asynchronous_saves_need_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match=r"checkpoint.async_save=True: this system cannot fork"):
        check_async_save()


def fail_to_write_later(folder: Path) -> list[str]:
    """Asynchronous saves whose writers fail, then do not end; then one that works. Returns what was said."""
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST, with_optimizer=False)
    texts = []
    saver = AsyncSaver(timeout_minutes=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # room for all but the weights
    try:
        saver.save(folder, 1, engine, with_optimizer=False)
        saver.finish()
    except ValueError as error:
        texts.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(folder, 2, engine, with_optimizer=False)
    saver._timeout_minutes = 0.002
    writer = saver._queue.async_calls[0].async_caller
    writer.process.join()  # so its result is there, and must not pass for that of the next save
    writer.is_current_async_call_done = lambda blocking, no_dist: False
    try:
        saver.finish()
    except ValueError as error:
        texts.append(str(error))
    saver._timeout_minutes = 1.0
    checkpoint_model.leave()
    engine = checkpoint_model.build(with_optimizer=False)  # a larger model, which the late result does not fit
    saver.save(folder, 3, engine, with_optimizer=False)
    assert saver.is_writing
    assert saver.finish() == folder / "iter_0000003"
    assert saver.finish() is None
    assert saver.poll() is None
    return texts


def test_writers_that_fail_or_do_not_end(tmp_path: Path) -> None:
    failed, late = run_ranks(fail_to_write_later, 1, tmp_path)[0]
    assert re.fullmatch(rf"writing checkpoint 1: failed on rank 0 with \w+ \(.*\)\. {UNTOUCHED}", failed), failed
    assert late.startswith("checkpoint.async_save=True: checkpoint 2 was not written within 0.002 minutes"), late
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def test_a_file_that_rank_0_does_not_see(run_copy: Path) -> None:
    """As with disks of single nodes."""
    checkpoint = run_copy / "iter_0000001"
    _check_all_there(checkpoint)
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(
        ValueError, match=r"rank 0 does not see 1 files .* first __0_0.distcp. Save on a file system that"
    ):
        _check_all_there(checkpoint)


def test_a_tensor_that_was_not_written(run_copy: Path) -> None:
    checkpoint = run_copy / "iter_0000001"
    metadata = read_metadata(checkpoint)
    metadata.storage_data.popitem()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"iter_0000001: (\d+) of \d+ tensors and objects were written. Save again."):
        _check_all_there(checkpoint)
