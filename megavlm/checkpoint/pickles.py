"""Refuses checkpoints whose pickles name anything but plain data.

A pickle is a program. torch and megatron-core run three kinds of them when a checkpoint is loaded: ``.metadata``
(``pickle.load``), ``common.pt`` and the objects inside the ``.distcp`` files (``torch.load``). Each is read here first,
against a list of the names it may use, and nothing of it is executed if it uses another one.
"""

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.serialization
from torch.distributed.checkpoint import BytesStorageMetadata, Metadata

from megavlm.checkpoint.agreement import rank, world_size

METADATA_NAME = ".metadata"
COMMON_NAME = "common.pt"

_ALLOWED_IN_METADATA = frozenset(
    f"{module}.{name}"
    for module, names in {
        "collections": ("OrderedDict",),
        "pathlib": ("Path", "PosixPath", "PurePosixPath"),
        "torch": ("Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        # plans, which megatron-core's asynchronous writer leaves in the metadata
        "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
        "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    }.items()
    for name in names
)

# What reading a damaged pickle raises, by the documentation of pickle.Unpickler.load and what it leaves open there.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)

_REMEDY = "Do not load it; ask where it comes from."


class _MetadataUnpickler(pickle.Unpickler):
    """Finds only the names of the list, whatever opcode asks for one."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED_IN_METADATA:
            raise _ForbiddenNameError(
                f"{self._path}: its pickle wants to use {module}.{name}, which is not data. {_REMEDY}"
            )
        return super().find_class(module, name)


class _ForbiddenNameError(Exception):
    """A pickle names something that is not on the list."""


def read_metadata(folder: Path) -> Metadata:
    """Read a checkpoint's ``.metadata``, finding only names that belong there.

    Raises:
        ValueError: it is missing, damaged, wants to use anything else, or names files outside the folder.
    """
    path = folder / METADATA_NAME
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing. Copy it again, or choose another checkpoint.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Choose another checkpoint.") from None
    except _ForbiddenNameError as error:
        raise ValueError(str(error)) from None
    except _PICKLE_ERRORS as error:
        raise ValueError(f"{path}: is damaged ({type(error).__name__}: {error}). Choose another checkpoint.") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path}: holds a {type(metadata).__name__}, not a checkpoint's metadata. {_REMEDY}")
    for info in metadata.storage_data.values():
        name = str(getattr(info, "relative_path", ""))
        if not re.fullmatch(r"[\w.-]+\.distcp", name):
            raise ValueError(f"{path}: names {name!r}, which is not a file of the checkpoint. {_REMEDY}")
    return metadata


def check_objects(folder: Path, metadata: Metadata) -> None:
    """Look through ``common.pt`` and this rank's share of the objects in ``.distcp`` files. Executes nothing.

    Raises:
        ValueError: a file is missing or damaged, or a pickle wants to use anything but plain data.
    """
    if rank() == 0:
        with _open(folder / COMMON_NAME) as file:
            _check_torch_file(file, str(folder / COMMON_NAME))
    objects = [
        (index.fqn, info)
        for index, info in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
    ]
    for key, info in objects[rank() :: world_size()]:
        path = folder / info.relative_path
        with _open(path) as file:
            file.seek(info.offset)
            _check_torch_file(io.BytesIO(file.read(info.length)), f"{path} ({key})")


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Make every ``torch.load`` of the block read data only, also where torch or megatron-core asks for more."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


def _open(path: Path) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Choose another checkpoint.") from None


def _check_torch_file(file: Any, where: str) -> None:
    """Check the names in a file of ``torch.save``; megatron-core has added its own to torch's list of plain data."""
    try:
        forbidden = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except _PICKLE_ERRORS as error:
        raise ValueError(
            f"{where}: is damaged or was not written by torch.save ({type(error).__name__}: {error}). Choose another "
            "checkpoint."
        ) from None
    if forbidden:
        raise ValueError(
            f"{where}: its pickle wants to use {', '.join(sorted(forbidden))}, which is not data. {_REMEDY}"
        )
