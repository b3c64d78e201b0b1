"""The training state of a DeepSpeed run in the form of the megatron engine's checkpoints.

Keys, shapes and common part are those that megatron-core's distributed optimizer writes, so each engine takes up the
other's runs. A tensor is gathered whole, one after the other, and kept by one data-parallel rank alone, on the CPU:
each rank holds and writes about its share of the whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megavlm.runtime.sharding import sharding_metadata

MOMENTS = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter, by megatron-core's names."""

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory

_ELSEWHERE = object()


class Shelves:
    """Spreads gathered tensors over the data-parallel ranks, each to the one that holds least so far."""

    def __init__(self) -> None:
        self._rank = parallel_state.get_data_parallel_rank()
        self._num_elements = [0] * parallel_state.get_data_parallel_world_size()

    def is_mine(self, num_elements: int) -> bool:
        """Whether this rank keeps the next tensor. Asked of every tensor, in the same order on all ranks."""
        owner = self._num_elements.index(min(self._num_elements))
        self._num_elements[owner] += num_elements
        return owner == self._rank


def place_of_parameters(model_state: Mapping[str, Any]) -> dict[torch.nn.Parameter, Sharded]:
    """Where each parameter stands in the checkpoint, in the order of the model.

    Args:
        model_state: a model's sharded state dict, whose tensors are its parameters themselves.
    """
    return {
        leaf.data: leaf
        for leaf in nested_values(model_state)
        if isinstance(leaf, Sharded) and isinstance(leaf.data, torch.nn.Parameter)
    }


def keep_weights(
    model_state: dict[str, Any], shelves: Shelves, gather: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, Any]:
    """A model's sharded state dict with the weights that this rank keeps, each gathered whole. Collective."""

    def fill(leaf: Any) -> Any:
        if not (isinstance(leaf, Sharded) and isinstance(leaf.data, torch.nn.Parameter)):
            return leaf
        whole = gather(leaf.data)
        if not shelves.is_mine(whole.numel()):
            return _ELSEWHERE
        kept = whole.detach().to("cpu", copy=True)
        if hasattr(leaf.data, "unpadded_shape"):
            kept.unpadded_shape = leaf.data.unpadded_shape  # type: ignore[attr-defined]
        return replace(leaf, data=kept, replica_id=_only_one(leaf))

    filled = dict_list_map_outplace(fill, model_state)
    return extract_matching_values(filled, lambda leaf: leaf is not _ELSEWHERE)[0]


def keep_moments(
    places: Mapping[torch.nn.Parameter, Sharded],
    shelves: Shelves,
    gather: Callable[[torch.nn.Parameter, str], Tensor],
) -> dict[int, dict[str, Sharded]]:
    """The optimizer's tensors that this rank keeps, each gathered whole. Collective."""
    kept: dict[int, dict[str, Sharded]] = {}
    for number, (parameter, place) in enumerate(_trained(places)):
        for name in MOMENTS:
            whole = gather(parameter, name)
            if shelves.is_mine(whole.numel()):
                data = whole.detach().to("cpu", torch.float32, copy=True)
                kept.setdefault(number, {})[name] = _moment(place, name, data, _only_one(place))
    return kept


def ask_for_moments(places: Mapping[torch.nn.Parameter, Sharded]) -> dict[int, dict[str, Sharded]]:
    """The optimizer's tensors as every rank loads them: whole, on the CPU."""
    return {
        number: {
            name: _moment(place, name, torch.empty(parameter.shape, dtype=torch.float32), place.replica_id)
            for name in MOMENTS
        }
        for number, (parameter, place) in enumerate(_trained(places))
    }


def moments_of_parameters(
    places: Mapping[torch.nn.Parameter, Sharded], loaded: Mapping[int, Mapping[str, Tensor]]
) -> dict[torch.nn.Parameter, Mapping[str, Tensor]]:
    """What came for :func:`ask_for_moments`, by parameter."""
    return {parameter: loaded[number] for number, (parameter, _) in enumerate(_trained(places))}


def common_state(param_groups: Sequence[Mapping[str, Any]], num_updates: int) -> dict[str, Any]:
    """What all ranks have in common, as megatron-core's distributed optimizer writes it."""
    groups = [
        {name: value for name, value in group.items() if name != "params"} | {"step": num_updates}
        for group in param_groups
    ]
    return {
        "optimizer": {"param_groups": groups},
        "param_state_sharding_type": sharding_metadata()["distrib_optim_sharding_type"],
    }


def num_updates_of(common: Mapping[str, Any]) -> int:
    """Updates that loaded moments have seen.

    Raises:
        ValueError: the parameter groups do not agree on it.
    """
    steps = {int(group.get("step", 0)) for group in common["optimizer"]["param_groups"]}
    if len(steps) != 1:
        raise ValueError(
            f"optimizer: its parameter groups have made {sorted(steps)} updates, and this engine keeps one number. "
            "Resume with engine.kind=megatron, or start from the weights (checkpoint.pretrained_checkpoint)."
        )
    return steps.pop()


def _trained(places: Mapping[torch.nn.Parameter, Sharded]) -> Iterable[tuple[torch.nn.Parameter, Sharded]]:
    return ((parameter, place) for parameter, place in places.items() if parameter.requires_grad)


def _moment(place: Sharded, name: str, data: Tensor, replica_id: Any) -> Sharded:
    changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{place.key}", "data": data, "replica_id": replica_id}
    if isinstance(place, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(place, **changes)


def _only_one(place: Sharded) -> tuple[int, ...]:
    """The replica number of a tensor that only one data-parallel rank has."""
    return (*place.replica_id[:-1], 0)
