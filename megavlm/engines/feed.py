"""Gives every rank of one model replica the same micro-batches, read by one of them.

The reader is the first rank of the replica (tensor rank 0 of the first pipeline stage). Others get tokens, labels and
masks; the pixels go only to the first pipeline stage, where the vision encoder is. What the reader cannot read stops
every rank with the reader's message instead of leaving the others to wait.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from megavlm.batch import Batch
from megavlm.runtime import current_device

_INTEGER_FIELDS = (
    "tokens",
    "labels",
    "position_ids",
    "cu_seqlens",
    "tiles_per_image",
    "visible_tiles",
    "tile_rows",
    "tile_context",
    "tile_tags",
    "row_lengths",
    "sources",
)


def is_reader() -> bool:
    """Whether this rank reads the data of its replica."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()


class Feed:
    """Iterates over steps: each a list of micro-batches on this rank's device."""

    def __init__(self, steps: Iterator[list[Batch]] | None) -> None:
        """Args:
        steps: the micro-batches of each step, on the CPU; given on the reader and None elsewhere.
        """
        assert (steps is not None) == is_reader(), "exactly the reader is given the data"
        self._steps = steps
        self._device = current_device()
        self._is_alone = parallel_state.get_model_parallel_group().size() == 1

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._steps is not None and self._is_alone:
            return [batch.to(self._device) for batch in next(self._steps)]
        return self._receive(_read(self._steps) if self._steps is not None else None)

    def _receive(self, read: list[Batch] | BaseException | None) -> list[Batch]:
        """Broadcast a step over the replica. ``read`` is what the reader got."""
        group = parallel_state.get_model_parallel_group()
        source = parallel_state.get_model_parallel_src_rank()
        header: list[Any] = [_header(read) if read is not None else None]
        torch.distributed.broadcast_object_list(header, src=source, group=group, device=self._device)
        if isinstance(header[0], str):
            if isinstance(read, BaseException):
                raise read
            raise RuntimeError(f"data: rank {source} could not read the next step: {header[0]}")
        if header[0] is None:
            raise StopIteration
        batches = read if isinstance(read, list) else [_empty_like(shapes) for shapes in header[0]]
        batches = [batch.to(self._device) for batch in batches]
        self._broadcast_fields(batches, _INTEGER_FIELDS, torch.int64, source, group)
        self._broadcast_fields(batches, ("loss_mask",), torch.float32, source, group)
        if parallel_state.is_pipeline_first_stage():
            if parallel_state.get_tensor_model_parallel_world_size() > 1:
                tensor_group = parallel_state.get_tensor_model_parallel_group()
                self._broadcast_fields(batches, ("tiles",), torch.uint8, source, tensor_group)
        else:
            for batch in batches:
                batch.tiles = batch.tiles[:0]
        return batches

    def _broadcast_fields(
        self, batches: Sequence[Batch], names: Sequence[str], dtype: torch.dtype, source: int, group: Any
    ) -> None:
        """Send fields of all micro-batches as one tensor; every rank's fields are filled in place."""
        fields = [getattr(batch, name) for batch in batches for name in names]
        packed = torch.cat([field.reshape(-1).to(dtype) for field in fields])
        torch.distributed.broadcast(packed, src=source, group=group)
        for field, values in zip(fields, packed.split([field.numel() for field in fields]), strict=True):
            field.copy_(values.view_as(field))


def _read(steps: Iterator[list[Batch]]) -> list[Batch] | BaseException:
    try:
        return next(steps)
    except (StopIteration, ValueError, OSError, RuntimeError) as error:
        return error  # told to the others before it is raised here


def _header(read: list[Batch] | BaseException) -> list[dict[str, Any]] | str | None:
    """What the other ranks need before the tensors: shapes and plain values, an error's text, or None at the end."""
    if isinstance(read, StopIteration):
        return None
    if isinstance(read, BaseException):
        return f"{type(read).__name__}: {read}"
    return [
        {
            "shapes": {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.tensors().items()},
            "values": batch.values(),
        }
        for batch in read
    ]


def _empty_like(header: dict[str, Any]) -> Batch:
    fields: dict[str, Any] = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in header["shapes"].items()
    }
    return Batch(**fields, **header["values"])
