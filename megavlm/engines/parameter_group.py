"""What differs between parameters in an optimizer step: megatron-core's parameter groups, one for each scale.

A parameter says by its attributes ``lr_scale`` and ``weight_decay_scale`` what its learning rate and its weight decay
are multiplied by; without one it is 1.
"""

import functools
from collections.abc import Iterable

import torch
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride


def config_overrides(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]
) -> dict[ParamKey, ParamGroupOverride]:
    """Return what differs between the parameter groups of an optimizer, megatron-core's own differences included.

    Args:
        config: of the optimizer; ``lr``, ``min_lr`` and ``weight_decay`` are those of scale 1.
        parameters: of this rank. Ranks may have other scales than each other; megatron-core makes their groups alike.
    """
    overrides = dict(get_standard_config_overrides(config))
    parameters = list(parameters)
    for scale in sorted({_lr_scale(parameter) for parameter in parameters} - {1.0}):
        matches = ParamPredicate(name=f"lr_scale={scale!r}", fn=functools.partial(_has_lr_scale, scale))
        # The scheduler reads max_lr and min_lr and sets lr, which counts where there is none. lr_mult does nothing but
        # tell groups apart: a checkpoint knows them by it and would give groups that differ in max_lr alone one state.
        lr, min_lr = config.lr * scale, config.min_lr * scale
        override = {"lr": lr, "max_lr": lr, "min_lr": min_lr, "lr_mult": scale}
        overrides[ParamKey(predicate=matches)] = override  # type: ignore[assignment]
    for scale in sorted({_weight_decay_scale(parameter) for parameter in parameters} - {1.0}):
        matches = ParamPredicate(name=f"weight_decay_scale={scale!r}", fn=functools.partial(_has_decay_scale, scale))
        overrides[ParamKey(predicate=matches)] = {"wd_mult": scale}
    return overrides


def _lr_scale(parameter: torch.nn.Parameter) -> float:
    return getattr(parameter, "lr_scale", 1.0)


def _weight_decay_scale(parameter: torch.nn.Parameter) -> float:
    """1 for vectors, which megatron-core's own overrides exempt from decay: another scale would contradict them."""
    return 1.0 if parameter.dim() == 1 else getattr(parameter, "weight_decay_scale", 1.0)


def _has_lr_scale(scale: float, parameter: torch.nn.Parameter) -> bool:
    return _lr_scale(parameter) == scale


def _has_decay_scale(scale: float, parameter: torch.nn.Parameter) -> bool:
    return _weight_decay_scale(parameter) == scale
