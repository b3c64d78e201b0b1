"""Reads the weights of a checkpoint one tensor at a time, whatever layout saved it, without a model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, TensorStorageMetadata

from megavlm.checkpoint.agreement import agreed
from megavlm.checkpoint.layout import read_info
from megavlm.checkpoint.manifest import verify
from megavlm.checkpoint.match import is_of_optimizer
from megavlm.checkpoint.pickles import check_objects, read_metadata, weights_only


class CheckpointWeights(Mapping[str, Tensor]):
    """The model's full tensors by checkpoint key, padding cut off. A tensor is read each time it is asked for."""

    def __init__(self, folder: Path, *, with_optimizer: bool = False) -> None:
        """Verify a checkpoint, and read what it says of itself.

        Args:
            folder: of the checkpoint.
            with_optimizer: the optimizer's tensors too, padding included.

        Raises:
            ValueError: it is damaged or not to be trusted.
        """
        verify(folder)
        self.folder = folder
        self._metadata = read_metadata(folder)
        check_objects(folder, self._metadata)
        info = read_info(folder)
        self._shapes = {} if info is None else info.unpadded_shapes
        self._entries = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and (with_optimizer or not is_of_optimizer(key))
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def template(self, key: str) -> Tensor:
        """Return a tensor on the ``meta`` device with the shape and dtype of ``key``'s."""
        entry = self._entries[key]
        return torch.empty(self._shapes.get(key, tuple(entry.size)), dtype=entry.properties.dtype, device="meta")

    def __getitem__(self, key: str) -> Tensor:
        """Read a full tensor.

        Raises:
            KeyError: the checkpoint has none of that key.
            ValueError: a file cannot be read.
        """
        template = self.template(key)
        full = torch.empty(self._entries[key].size, dtype=template.dtype)
        reader, planner = FileSystemReader(self.folder), DefaultLoadPlanner(flatten_state_dict=False)
        with agreed(f"reading {key} of {self.folder}"), weights_only():
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            planner.set_up_planner({key: full}, self._metadata, is_coordinator=True)
            reader.read_data(planner.create_local_plan(), planner).wait()
        return full[tuple(slice(0, size) for size in template.shape)]
