"""Gives every parameter its value from a full (unsharded) tensor, whatever the layout.

A parameter is known by its checkpoint key (``language.decoder.layers.3.mlp.linear_fc2.weight``) and its place in the
full tensor, both of which megatron-core's sharded state dict states. Random initialisation and imported weights come in
through the same door, so a model starts equal under every tensor- and pipeline-parallel layout.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.models.part import PARTS, part_of
from megavlm.runtime.sharding import sharding_metadata


@dataclass(frozen=True)
class WeightSlot:
    """What a full tensor is asked for."""

    key: str
    """Checkpoint key."""
    shape: tuple[int, ...]
    """Shape of the full tensor, padding not counted."""
    constant: float | None
    """The value that a fresh model starts with everywhere, or None where it is drawn at random."""


FullTensor = Callable[[WeightSlot], Tensor]
"""Gives the full tensor of a slot: any floating dtype, on the CPU."""


def start_at(parameter: torch.nn.Parameter, constant: float) -> torch.nn.Parameter:
    """Say that a fresh model holds ``constant`` in this parameter (norm weights, layer scales, gates)."""
    parameter.constant = constant  # type: ignore[attr-defined]
    return parameter


def mark_padded(parameter: torch.nn.Parameter, full_shape: tuple[int, ...]) -> None:
    """Say that a parameter's full tensor is padded beyond ``full_shape`` (dummy heads, rows past the vocabulary).

    Padding holds zeros, is never drawn at random, and may differ between layouts and checkpoints.
    """
    parameter.unpadded_shape = full_shape  # type: ignore[attr-defined]


def fill_weights(chunks: Sequence[MegatronModule], full_tensor: FullTensor, parts: Collection[str] = PARTS) -> set[str]:
    """Copy each parameter's part of its full tensor into this rank's model chunks, in place.

    Args:
        chunks: this rank's (unwrapped) model chunks.
        full_tensor: gives the full tensor of a slot.
        parts: of the model that are filled; the others are left as they are.

    Returns:
        The keys that were filled.

    Raises:
        ValueError: a full tensor has another shape than the parameter.
    """
    filled: set[str] = set()
    with torch.no_grad():
        for chunk in chunks:
            for shard in _floating_shards(chunk.sharded_state_dict(metadata=sharding_metadata())):
                if part_of(shard.key) not in parts:
                    continue
                shape = getattr(shard.data, "unpadded_shape", tuple(shard.global_shape))
                full = full_tensor(WeightSlot(shard.key, tuple(shape), getattr(shard.data, "constant", None)))
                if tuple(full.shape) != tuple(shape):
                    raise ValueError(
                        f"{shard.key}: the given tensor has shape {tuple(full.shape)}, the model's has {tuple(shape)}. "
                        "Check the model part of the recipe against the weights' own configuration."
                    )
                _copy_shard(full, shard)
                filled.add(shard.key)
    return filled


def count_unreachable(chunks: Sequence[MegatronModule]) -> int:
    """Count this rank's parameter elements that :func:`fill_weights` cannot reach: 0 unless a module hides some."""
    reached = sum(
        shard.data.numel()
        for chunk in chunks
        for shard in _floating_shards(chunk.sharded_state_dict(metadata=sharding_metadata()))
    )
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()) - reached


def _floating_shards(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensorFactory):
        yield from _floating_shards(tree.build())
    elif isinstance(tree, ShardedTensor):
        if tree.data is not None and tree.data.is_floating_point():
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _floating_shards(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _floating_shards(value)


def _copy_shard(full: Tensor, shard: ShardedTensor) -> None:
    """Copy the shard's window of the full tensor; what lies beyond the full tensor is padding and becomes zero."""
    shard.data.zero_()
    window = []
    local_shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)  # an expert has no dimension of its own
    for offset, size, length in zip(shard.global_offset, local_shape, full.shape, strict=True):
        start, stop = min(offset, length), min(offset + size, length)
        window.append(slice(start, stop))
    part = full[tuple(window)].flatten(0, shard.prepend_axis_num)
    shard.data[tuple(slice(0, size) for size in part.shape)].copy_(part)


def count_parameters(chunks: Sequence[MegatronModule]) -> Counter[str]:
    """Count the model's parameters per part, padding not counted, each once over all ranks.

    Args:
        chunks: this rank's (unwrapped) model chunks.

    Returns:
        Part (:func:`megavlm.models.part.part_of`) -> parameters whose beginning lies on this rank. The sum over all
        ranks is the whole model's.
    """
    counts: Counter[str] = Counter()
    for chunk in chunks:
        for shard in _floating_shards(chunk.sharded_state_dict(metadata=sharding_metadata())):
            if is_main_replica(shard.replica_id) and not any(shard.global_offset):
                shape = getattr(shard.data, "unpadded_shape", shard.global_shape)
                counts[part_of(shard.key)] += math.prod(shape)
    return counts
