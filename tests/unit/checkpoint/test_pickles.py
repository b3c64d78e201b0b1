"""Pickles of strangers: nothing in them is executed, and what they wanted is named."""

import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_model
import pytest
import torch
from harness import run_ranks
from torch.distributed.checkpoint import BytesStorageMetadata, Metadata

from megavlm.checkpoint import load, load_checkpoint
from megavlm.checkpoint.manifest import write_manifest
from megavlm.checkpoint.pickles import check_objects, read_metadata, weights_only


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.mkdir, (self.marker, 0o700)


FORBIDDEN = rf"wants to use {os.mkdir.__module__}\.mkdir, which is not data"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(run_copy: Path) -> Path:
    return run_copy / "iter_0000002"


def test_our_own_checkpoint_is_fine(checkpoint: Path) -> None:
    metadata = read_metadata(checkpoint)
    check_objects(checkpoint, metadata)
    kinds = {type(entry) for entry in metadata.state_dict_metadata.values()}
    assert BytesStorageMetadata in kinds  # there were objects to look at


def test_evil_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_metadata_that_calls_a_function(checkpoint: Path, marker: Path, protocol: int) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(marker), protocol=protocol))
    with pytest.raises(ValueError, match=rf"\.metadata: its pickle {FORBIDDEN}"):
        read_metadata(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"(S'touch /nowhere'\nios\nsystem\n.",  # INST
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93.",  # a dotted name
        b"\x80\x02ctorch.distributed.checkpoint.filesystem\nos\n.",  # a module that another one imported
    ],
)
def test_metadata_that_names_what_is_not_data(checkpoint: Path, program: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(program)
    with pytest.raises(ValueError, match=r"wants to use \S+, which is not data. Do not load it"):
        read_metadata(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))])
def test_metadata_that_is_none(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata: (is damaged|holds a \w+, not a checkpoint's metadata)"):
        read_metadata(checkpoint)


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", "evil.pkl", "", None])
def test_metadata_that_points_elsewhere(checkpoint: Path, name: str | None) -> None:
    metadata = read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="which is not a file of the checkpoint"):
        read_metadata(checkpoint)


def put_into_common(checkpoint: Path, content: Any) -> None:
    torch.save(content, checkpoint / "common.pt")


def put_into_object(checkpoint: Path, content: Any) -> None:
    """Append an object to a .distcp file, and let the metadata of a real one point to it."""
    metadata = read_metadata(checkpoint)
    info = next(
        info
        for index, info in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    )
    buffer = io.BytesIO()
    torch.save([content], buffer)
    with open(checkpoint / info.relative_path, "ab") as file:
        info.offset, info.length = file.tell(), len(buffer.getvalue())
        file.write(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = [put_into_common, put_into_object]


@pytest.mark.parametrize("put", PLACES)
def test_object_that_calls_a_function(checkpoint: Path, marker: Path, put: Callable[[Path, Any], None]) -> None:
    put(checkpoint, Evil(marker))
    with pytest.raises(ValueError, match=FORBIDDEN):
        check_objects(checkpoint, read_metadata(checkpoint))
    assert not marker.exists()


def test_common_part_of_an_old_format(checkpoint: Path, marker: Path) -> None:
    """torch.load also reads files that are no zip archives, by other ways."""
    torch.save(Evil(marker), checkpoint / "common.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"common\.pt: is damaged or was not written by torch\.save"):
        check_objects(checkpoint, read_metadata(checkpoint))
    assert not marker.exists()


def test_common_part_with_a_newer_pickle(checkpoint: Path, marker: Path) -> None:
    """Opcodes that a scan for names would not see are refused."""
    path = checkpoint / "common.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(Evil(marker), protocol=4) if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match=r"common\.pt: "):
        check_objects(checkpoint, read_metadata(checkpoint))
    assert not marker.exists()


def test_weights_only_reads_data_whatever_is_asked_for(tmp_path: Path, marker: Path, monkeypatch: Any) -> None:
    torch.save(Evil(marker), tmp_path / "file.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with weights_only(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def load_all(folders: list[Path], *, check: bool) -> list[str]:
    """Load checkpoints; return what was said of each."""
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST)
    said = []
    if not check:
        load.check_objects = lambda folder, metadata: None
    try:
        for folder in folders:
            try:
                load_checkpoint(folder, engine, with_optimizer=True)
                said.append("loaded")
            except ValueError as error:
                said.append(str(error))
    finally:
        load.check_objects = check_objects
    return said


def load_unchecked(folders: list[Path]) -> list[str]:
    return load_all(folders, check=False)


def load_checked(folders: list[Path]) -> list[str]:
    return load_all(folders, check=True)


@pytest.mark.parametrize(
    ("load_folders", "expected"), [(load_checked, FORBIDDEN), (load_unchecked, "Weights only load failed|mkdir")]
)
def test_loading_executes_nothing(
    run_copy: Path, marker: Path, load_folders: Callable[..., Any], expected: str
) -> None:
    """With a manifest that agrees; and torch itself is told to read data only, should the check not see something."""
    folders = []
    for put in PLACES:
        folder = Path(shutil.copytree(run_copy / "iter_0000002", run_copy / put.__name__))
        put(folder, Evil(marker))
        write_manifest(folder)
        folders.append(folder)
    for said in run_ranks(load_folders, 1, folders)[0]:
        assert re.search(expected, said), said
    assert not marker.exists()
