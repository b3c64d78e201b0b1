"""Asks a checkpoint for some of its weights, by the names that they have there."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed.checkpoint import Metadata

from megavlm.checkpoint.agreement import gather
from megavlm.checkpoint.match import is_of_optimizer
from megavlm.models.part import part_of
from megavlm.models.taken import lies_in, moved


def offered(metadata: Metadata, names: Mapping[str, str], folder: Path) -> Metadata:
    """Return what a checkpoint holds under the names there.

    Args:
        metadata: the checkpoint's.
        names: name in the model -> name in the checkpoint.
        folder: the checkpoint, for errors.

    Raises:
        ValueError: it holds nothing under one of them.
    """
    held = {key: value for key, value in metadata.state_dict_metadata.items() if not is_of_optimizer(key)}
    for there in names.values():
        if not any(lies_in(key, there) for key in held):
            parts = ", ".join(sorted({part_of(key) for key in held}))
            raise ValueError(
                f"{folder}: holds no {there}, which checkpoint.pretrained_checkpoint.take asks for; its parts are "
                f"{parts}. Take what it has, or check the path."
            )
    return Metadata({key: value for key, value in held.items() if any(lies_in(key, name) for name in names.values())})


def in_model(keys: Iterable[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Return what weights that were taken are called in the model.

    Args:
        keys: of the checkpoint.
        names: name in the model -> name in the checkpoint.
    """
    back = {there: here for here, there in names.items()}
    return tuple(sorted(str(moved(key, back)) for key in keys))


def ask(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a model's sharded state dict with what it takes alone, under the names there. Collective.

    Args:
        state: of this rank; its entries are renamed in place.
        names: name in the model -> name in the checkpoint.

    Raises:
        ValueError: the model has nothing under one of the names; on every rank.
    """
    here = [leaf.key for leaf in nested_values(state) if isinstance(leaf, ShardedBase)]
    found = set().union(*gather({name for name in names if any(lies_in(key, name) for key in here)}))
    if absent := [name for name in names if name not in found]:
        raise ValueError(
            f"checkpoint.pretrained_checkpoint.take: the model has no {absent[0]}. Names are those of the model's "
            "modules, as `megavlm plan --modules` lists them."
        )

    def is_taken(leaf: Any) -> bool:
        return isinstance(leaf, ShardedBase) and moved(leaf.key, names) is not None

    taken, _ = extract_matching_values(state, is_taken)
    for leaf in nested_values(taken):
        leaf.key = moved(leaf.key, names)
    return {chunk: {} for chunk in state} | taken  # a pipeline stage may have nothing of it
