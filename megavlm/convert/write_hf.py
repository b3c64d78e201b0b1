"""Writes safetensors files of which no one has to be in memory, with the index that ``transformers`` reads.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length (little endian), the
header (JSON: name -> dtype, shape, first and last byte), the tensors' bytes without gaps. Shapes and dtypes are known
before the tensors are, so the header goes first and each tensor then to its place.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megavlm.checkpoint import durable
from megavlm.convert.read_hf import INDEX_NAME

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8
_LENGTH_BYTES = 8


@dataclass
class _File:
    """One file: what it will hold, and where."""

    entries: dict[str, Tensor] = field(default_factory=dict)
    num_bytes: int = 0
    name: str = ""
    start: int = 0
    """Where the tensors' bytes begin."""
    offsets: dict[str, int] = field(default_factory=dict)
    """From there."""

    def header(self) -> bytes:
        """The header, padded so that the tensors are aligned. Sets ``offsets`` and ``start``."""
        tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        # wide elements first, so that every tensor is aligned to its own
        for name, template in sorted(self.entries.items(), key=lambda entry: -entry[1].element_size()):
            self.offsets[name] = position
            end = position + template.nbytes
            dtype = _DTYPE_NAMES[template.dtype]
            tree[name] = {"dtype": dtype, "shape": list(template.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.start = _LENGTH_BYTES + len(text)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def parse_size(text: str) -> int:
    """Read a number of bytes as people write it: ``2GB``, ``500MB``, ``4096``. Units are decimal, as transformers'.

    Raises:
        ValueError: it is not one, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = 0 if match is None else int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise ValueError(f"--max-shard-size={text}: is not a number of bytes. Write it like 2GB or 500MB.")
    return size


class ShardWriter:
    """The weight files of a Hugging Face folder. ``with`` closes them, and waits until they are on the disk."""

    def __init__(
        self, folder: Path, groups: Sequence[dict[str, Tensor]], max_shard_bytes: int, *, stem: str = "model"
    ) -> None:
        """Plan the files.

        Args:
            folder: exists.
            groups: name -> tensor on the ``meta`` device; the tensors of a group go into one file. In writing order.
            max_shard_bytes: most bytes of tensors in a file; a larger group has a file of its own.
            stem: what the files' names begin with.
        """
        files = [_File()]
        for group in groups:
            num_bytes = sum(template.nbytes for template in group.values())
            if files[-1].num_bytes and files[-1].num_bytes + num_bytes > max_shard_bytes:
                files.append(_File())
            files[-1].entries.update(group)
            files[-1].num_bytes += num_bytes
        for number, file in enumerate(files, start=1):
            is_only = len(files) == 1
            file.name = f"{stem}.safetensors" if is_only else f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        self._folder = folder
        self._files = files
        self._file_of = {name: file for file in files for name in file.entries}
        self._stack = contextlib.ExitStack()
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> "ShardWriter":
        for file in self._files:
            stream = self._stack.enter_context(open(self._folder / file.name, "wb"))
            stream.write(file.header())
            self._open[file.name] = stream
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place; it has the dtype and shape that were planned."""
        file = self._file_of[name]
        template = file.entries[name]
        assert (tensor.shape, tensor.dtype) == (template.shape, template.dtype), f"{name} is not as planned"
        stream = self._open[file.name]
        stream.seek(file.start + file.offsets[name])
        stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if error[0] is None:
            for file in self._files:
                durable.sync(self._folder / file.name)
            if len(self._files) > 1:
                total = sum(file.num_bytes for file in self._files)
                names = {name: file.name for name, file in sorted(self._file_of.items())}
                tree = {"metadata": {"total_size": total}, "weight_map": names}
                durable.write_file(self._folder / INDEX_NAME, (json.dumps(tree, indent=2) + "\n").encode())
