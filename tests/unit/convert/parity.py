"""Runs our modules on ranks with given published weights, and hands back outputs and gradients under published names.

The published model runs in the test's own process, so the ranks never import transformers. Shape letters: T tiles.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megavlm.convert.weight_map import WeightMap, load_weights, to_theirs
from megavlm.models.backend import BACKENDS
from megavlm.runtime.sharding import sharding_metadata

FP32: dict[str, Any] = {
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}


class Holder(torch.nn.Module):
    """A model of one part."""

    def __init__(self, name: str, part: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, part)
        self.part = name

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, self.part).sharded_state_dict(prefix=f"{self.part}.", metadata=metadata)


def start(tp: int, pp: int = 1) -> dict[str, Any]:
    """Make megatron-core's groups. Returns the settings of the layout."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return {**FP32, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}


def load_part(name: str, part: torch.nn.Module, weight_map: WeightMap, weights: Mapping[str, Tensor]) -> Holder:
    """Fill one part; every parameter starts as NaN, so one that is not filled is seen."""
    for parameter in part.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    holder = Holder(name, part)
    load_weights([holder], weight_map, weights)
    assert not any(parameter.isnan().any() for parameter in part.parameters())
    return holder


def encode(
    tp: int, config: Any, weight_map: WeightMap, weights: Mapping[str, Tensor], tiles: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Run a vision encoder forward and backward from ``upstream``: features, gradient of tiles and of weights."""
    part = config.build(start(tp), BACKENDS["torch"])
    holder = load_part("vision", part, weight_map, weights)
    inputs = tiles.clone().requires_grad_()
    features = part(inputs)
    features.backward(upstream)
    return features.detach(), inputs.grad, to_theirs(weight_map, gradients(holder))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the full gradient of each parameter by checkpoint key; padding must be exactly zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return read_weights(model)


def read_weights(*chunks: torch.nn.Module) -> dict[str, Tensor]:
    """Return full tensors by checkpoint key, padding cut off after checking that it is zero."""
    windows = []
    for chunk in chunks:
        for shard in _shards(chunk.sharded_state_dict(metadata=sharding_metadata())):
            real = getattr(shard.data, "unpadded_shape", tuple(shard.global_shape))
            window = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
            windows.append((shard.key, tuple(shard.global_shape), real, window, shard.data.detach().clone()))
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, windows)
    full: dict[str, Tensor] = {}
    shapes = {}
    for key, global_shape, real, window, data in (entry for rank in ranks for entry in rank):
        tensor = full.setdefault(key, torch.full(global_shape, float("nan"), dtype=data.dtype))
        before = tensor[window]
        assert before.isnan().all() or torch.equal(before, data), f"{key}: copies differ between ranks"
        tensor[window] = data
        shapes[key] = real
    for key, tensor in full.items():
        real = tensor[tuple(slice(0, n) for n in shapes[key])].clone()
        assert tensor.square().sum() == 0 or tensor.count_nonzero() == real.count_nonzero(), f"{key}: padding moved"
        full[key] = real
    return full


def _shards(tree: Any) -> list[ShardedTensor]:
    if isinstance(tree, ShardedTensorFactory):
        return _shards(tree.build())
    if isinstance(tree, ShardedTensor):
        return [tree] if tree.data.is_floating_point() else []
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [shard for entry in tree for shard in _shards(entry)] if isinstance(tree, list) else []


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any tensor, relative to that tensor's largest value.

    The gradient of a key's bias is zero but for rounding (softmax does not see it), so no tensor's largest value counts
    as less than a hundredth of the largest of all.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    floor = 1e-2 * max(float(tensor.abs().max()) for tensor in expected.values())
    return max(relative_difference(found[name], expected[name], floor) for name in expected)


def relative_difference(found: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """Return the largest difference relative to the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(floor))


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter of a published model weights that matter: no zero biases, no norms of one."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and not name.endswith("bias") and "embed" not in name
            parameter.copy_(1.0 + 0.2 * noise if is_scale else noise * (0.5 / parameter.shape[-1] ** 0.5))
