"""What a checkpoint says of itself beside megatron-core's files: ``layout.json``."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megavlm.checkpoint.agreement import world_size
from megavlm.runtime import current_device

LAYOUT_NAME = "layout.json"


@dataclass(frozen=True)
class Layout:
    """How the ranks shared the model. Equal layouts can take over each other's random number generators."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int | None
    context_parallel_size: int
    expert_model_parallel_size: int
    device: str

    @classmethod
    def of_this_run(cls) -> "Layout":
        """The layout of megatron-core's groups."""
        return cls(
            world_size=world_size(),
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
            virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
            device=current_device().type,
        )


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of ``layout.json``."""

    iteration: int
    """Steps done; 0 for a release."""
    layout: Layout
    unpadded_shapes: dict[str, tuple[int, ...]]
    """Checkpoint key of each padded weight -> its shape without the padding."""

    def dump(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


def read_info(folder: Path) -> CheckpointInfo | None:
    """Read ``layout.json``; None if there is none, as in checkpoints of other programs.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / LAYOUT_NAME
    try:
        tree = json.loads(path.read_bytes())
        shapes = {str(key): tuple(int(size) for size in shape) for key, shape in tree["unpadded_shapes"].items()}
        return CheckpointInfo(int(tree["iteration"]), Layout(**tree["layout"]), shapes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({type(error).__name__}: {error}). Choose another checkpoint.") from None


def sharded_leaves(tree: Any) -> Iterator[ShardedTensor | ShardedObject]:
    """All tensors and objects of a sharded state dict, factories built."""
    for value in nested_values(tree):
        if isinstance(value, ShardedTensorFactory):
            yield from sharded_leaves(value.build())
        elif isinstance(value, ShardedTensor | ShardedObject):
            yield value


def drop_empty_moments(state: dict[str, Any]) -> None:
    """Take out, in place, the moments of optimizers that have none on this rank: a stage on which nothing trains.

    Without tensors they count as part of what all ranks have in common, and there the ranks would differ.
    """
    for optimizer in _optimizers(state):
        if _is_empty(optimizer):
            optimizer.pop("param_state", None)


def put_back_empty_moments(asked: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Give loaded optimizers, in place, the empty moments that :func:`drop_empty_moments` took out.

    Args:
        asked: the sharded state dict that was asked for.
        loaded: what came.
    """
    for wanted, optimizer in zip(_optimizers(asked), _optimizers(loaded), strict=True):
        if _is_empty(wanted):
            optimizer["param_state"] = {}


def _optimizers(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of one optimizer, or of several by number; none if they are not sharded over data-parallel ranks."""
    state = state.get("optimizer", {})
    states = [state] if "optimizer" in state else [state[number] for number in sorted(state, key=str)]
    return [each for each in states if isinstance(each, dict) and "param_state_sharding_type" in each]


def _is_empty(optimizer: dict[str, Any]) -> bool:
    return not any(sharded_leaves(optimizer.get("param_state", {})))


def unpadded_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """This rank's padded weights (see :func:`megavlm.models.weights.mark_padded`): key -> shape without padding."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in sharded_leaves(tree):
        shape = getattr(leaf.data, "unpadded_shape", None) if isinstance(leaf.data, torch.Tensor) else None
        if shape is not None:
            shapes[leaf.key] = tuple(shape)
    return shapes
