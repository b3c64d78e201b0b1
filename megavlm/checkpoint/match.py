"""Compares what a model asks for with what a checkpoint holds, before anything is loaded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata

from megavlm.checkpoint.agreement import gather
from megavlm.checkpoint.layout import CheckpointInfo, sharded_leaves, unpadded_shapes
from megavlm.models.part import PARTS, part_of

_NUM_SHOWN = 5


@dataclass(frozen=True)
class Mismatch:
    """Keys that both sides have, and that only one has. The same on every rank."""

    common: tuple[str, ...]
    """Weights of the model that the checkpoint holds."""
    missing: tuple[str, ...]
    """Weights of the model that the checkpoint does not hold."""
    unexpected: tuple[str, ...]
    """Weights of the checkpoint that the model does not have."""
    num_extra_states: int
    """Objects of megatron-core's layers (``_extra_state``) that only one side has. They hold no weights."""


def compare(state: Mapping[str, Any], metadata: Metadata, info: CheckpointInfo | None, folder: Path) -> Mismatch:
    """Compare keys and shapes. Collective.

    Args:
        state: this rank's sharded state dict.
        metadata: the checkpoint's.
        info: what the checkpoint says of its padding; None: not known.
        folder: the checkpoint, for errors.

    Raises:
        ValueError: a tensor has another shape in the checkpoint; names it with both shapes. On every rank.
    """
    held = metadata.state_dict_metadata
    wrong = next((text for part in gather(_wrong_shapes(state, metadata, info, folder)) for text in part), None)
    if wrong is not None:
        raise ValueError(wrong)
    asked_tensors: set[str] = set()
    asked_objects: set[str] = set()
    for tensors, objects in gather(_keys(state)):
        asked_tensors |= tensors
        asked_objects |= objects
    held_tensors = {key for key, value in held.items() if isinstance(value, TensorStorageMetadata)}
    with_optimizer = "optimizer" in state
    held_tensors = {key for key in held_tensors if with_optimizer or not is_of_optimizer(key)}
    held_objects = {key for key in held if "._extra_state/" in key}
    return Mismatch(
        common=tuple(sorted(asked_tensors & held_tensors)),
        missing=tuple(sorted(asked_tensors - held_tensors)),
        unexpected=tuple(sorted(held_tensors - asked_tensors)),
        num_extra_states=len(asked_objects ^ held_objects),
    )


def weights_of(state: Mapping[str, Any]) -> set[str]:
    """Return the keys of all ranks' weights. Collective."""
    return set().union(*(tensors for tensors, _ in gather(_keys(state))))


def is_of_optimizer(key: str) -> bool:
    """Whether a checkpoint key is the optimizer's."""
    return key.startswith(("optimizer.", "chained_"))


def has_optimizer(metadata: Metadata) -> bool:
    """Whether a run can be resumed from a checkpoint."""
    return any(is_of_optimizer(key) for key in metadata.state_dict_metadata)


def absent_parts(metadata: Metadata) -> set[str]:
    """Parts of a model of which a checkpoint holds nothing."""
    return set(PARTS) - {part_of(key) for key in metadata.state_dict_metadata if not is_of_optimizer(key)}


def without_missing(state: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Return the sharded state dict without the parts that the checkpoint does not hold."""

    def is_held(value: Any) -> bool:
        if not isinstance(value, ShardedBase):
            return True
        return all(_full_key(leaf) in metadata.state_dict_metadata for leaf in sharded_leaves([value]))

    return extract_matching_values(state, is_held)[0]


def check_allowed(
    mismatch: Mismatch,
    folder: Path,
    *,
    allow_missing: Callable[[str], bool],
    allow_unexpected: Callable[[str], bool],
) -> None:
    """Refuse a mismatch that is not allowed.

    Args:
        mismatch: what :func:`compare` found.
        folder: the checkpoint, for errors.
        allow_missing, allow_unexpected: whether a key may be.

    Raises:
        ValueError: says how many keys are missing and unexpected, and which come first.
    """
    missing = [key for key in mismatch.missing if not allow_missing(key)]
    unexpected = [key for key in mismatch.unexpected if not allow_unexpected(key)]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys of the model are not in it ({shown(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} of its keys are not in the model ({shown(unexpected)})")
    if not parts:
        return
    if all(is_of_optimizer(key) for key in (*missing, *unexpected)):
        remedy = (
            "Other parts were trained then: train the same parts to resume, or start from its weights "
            "(checkpoint.pretrained_checkpoint)."
        )
    else:
        remedy = "Check the model part of the recipe against the checkpoint's recipe.yaml."
        if any(key.startswith("vision.encoders.") for key in missing):
            remedy = "One of several encoders comes from an encoder alone by take: {vision.encoders.0: vision}."
    raise ValueError(f"{folder}: does not fit the model: {' and '.join(parts)}. {remedy}")


def _keys(state: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """This rank's keys: of tensors and of objects."""
    tensors: set[str] = set()
    objects: set[str] = set()
    for leaf in sharded_leaves(state):
        (objects if isinstance(leaf, ShardedObject) else tensors).add(_full_key(leaf))
    return tensors, objects


def _full_key(leaf: ShardedTensor | ShardedObject) -> str:
    return leaf.unique_key if isinstance(leaf, ShardedObject) else leaf.key


def _wrong_shapes(state: Mapping[str, Any], metadata: Metadata, info: CheckpointInfo | None, folder: Path) -> list[str]:
    """A sentence for each of this rank's tensors whose full shape is another one in the checkpoint."""
    remedy = "Check the model part of the recipe against the checkpoint's recipe.yaml."
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for leaf in sharded_leaves(state):
        held = metadata.state_dict_metadata.get(_full_key(leaf))
        if (
            isinstance(leaf, ShardedTensor)
            and isinstance(held, TensorStorageMetadata)
            and not leaf.allow_shape_mismatch
        ):
            shapes[leaf.key] = (tuple(held.size), tuple(leaf.global_shape))
    if info is not None:  # padded shapes may differ, what they pad may not
        for key, shape in unpadded_shapes(state).items():
            if key in metadata.state_dict_metadata:
                shapes[key] = (info.unpadded_shapes.get(key, shape), shape)
    return [
        f"{folder}: {key} has shape {held_shape} in the checkpoint and {shape} in the model. {remedy}"
        for key, (held_shape, shape) in sorted(shapes.items())
        if held_shape != shape
    ]


def shown(keys: Iterable[str]) -> str:
    """The first few keys, as text."""
    keys = list(keys)
    return ", ".join(keys[:_NUM_SHOWN]) + (", ..." if len(keys) > _NUM_SHOWN else "")
