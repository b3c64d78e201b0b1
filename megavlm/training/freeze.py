"""Which parts of a model train in a stage, and how fast."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megavlm.models.part import PARTS, Trainable, parameters_by_name, part_of


def freeze_except(chunks: Sequence[torch.nn.Module], trainable: Trainable | Iterable[str]) -> set[str]:
    """Set ``requires_grad`` of every parameter, in place: True for those that train, False for the others.

    Args:
        chunks: this rank's (unwrapped) model chunks; a part may be absent from them.
        trainable: what trains, or the names of whole parts (of ``megavlm.models.part.PARTS``).

    Returns:
        The modules of ``trainable.within`` that have a parameter here, as ``part.module``.
    """
    wanted = trainable if isinstance(trainable, Trainable) else Trainable(frozenset(trainable))
    assert wanted.parts <= set(PARTS), wanted
    modules = [(part, pattern) for part, patterns in wanted.within.items() for pattern in patterns]
    found = set()
    for chunk in chunks:
        for name, parameter in parameters_by_name(chunk):
            parameter.requires_grad_(name in wanted)
            found |= {
                f"{part}.{pattern}"
                for part, pattern in modules
                if part_of(name) == part and wanted.matches(pattern, name)
            }
    return found


def scale_learning_rates(chunks: Sequence[torch.nn.Module], scales: Mapping[Any, float]) -> None:
    """Say what the learning rate of each part is multiplied by, before the engine makes its optimizer.

    Args:
        chunks: this rank's (unwrapped) model chunks; their parameters get the attribute ``lr_scale``.
        scales: part of ``megavlm.models.part.PARTS`` -> factor; 1 for those that are not named.
    """
    _mark(chunks, "lr_scale", scales)


def scale_weight_decay(chunks: Sequence[torch.nn.Module], scales: Mapping[Any, float]) -> None:
    """Say what the weight decay of each part is multiplied by, before the engine makes its optimizer.

    Args:
        chunks: this rank's (unwrapped) model chunks; their parameters get the attribute ``weight_decay_scale``.
        scales: as in :func:`scale_learning_rates`.
    """
    _mark(chunks, "weight_decay_scale", scales)


def _mark(chunks: Sequence[torch.nn.Module], attribute: str, scales: Mapping[Any, float]) -> None:
    assert scales.keys() <= set(PARTS), scales
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            setattr(parameter, attribute, float(scales.get(part_of(name), 1.0)))
