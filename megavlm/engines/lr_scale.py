"""Learning rates that differ between parameters: megatron-core's parameter groups, one for each scale.

A parameter says its scale as its attribute ``lr_scale``; without one it is 1.
"""

import functools
from collections.abc import Iterable

import torch
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride


def lr_scale(parameter: torch.nn.Parameter) -> float:
    """What the learning rate of a parameter is multiplied by."""
    return getattr(parameter, "lr_scale", 1.0)


def config_overrides(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]
) -> dict[ParamKey, ParamGroupOverride]:
    """Return what differs between the parameter groups of an optimizer, megatron-core's own differences included.

    Args:
        config: of the optimizer; ``lr`` and ``min_lr`` are those of scale 1.
        parameters: of this rank. Ranks may have other scales than each other; megatron-core makes their groups alike.
    """
    overrides = dict(get_standard_config_overrides(config))
    for scale in sorted({lr_scale(parameter) for parameter in parameters} - {1.0}):
        matches = ParamPredicate(name=f"lr_scale={scale!r}", fn=functools.partial(_has_scale, scale))
        # The scheduler reads max_lr and min_lr and sets lr, which counts where there is none. lr_mult does nothing but
        # tell groups apart: a checkpoint knows them by it and would give groups that differ in max_lr alone one state.
        lr, min_lr = config.lr * scale, config.min_lr * scale
        override = {"lr": lr, "max_lr": lr, "min_lr": min_lr, "lr_mult": scale}
        overrides[ParamKey(predicate=matches)] = override  # type: ignore[assignment]
    return overrides


def _has_scale(scale: float, parameter: torch.nn.Parameter) -> bool:
    return lr_scale(parameter) == scale
