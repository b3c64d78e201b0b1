"""Which parts of a model train in a stage, and how fast."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megavlm.models.part import PARTS, part_of


def freeze_except(chunks: Sequence[torch.nn.Module], trainable: Iterable[str]) -> None:
    """Set ``requires_grad`` of every parameter, in place: True in the named parts, False in the others.

    Args:
        chunks: this rank's (unwrapped) model chunks; a part may be absent from them.
        trainable: names of ``megavlm.models.part.PARTS``.
    """
    wanted = set(trainable)
    assert wanted <= set(PARTS), wanted
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(part_of(name) in wanted)


def scale_learning_rates(chunks: Sequence[torch.nn.Module], scales: Mapping[Any, float]) -> None:
    """Say what the learning rate of each part is multiplied by, before the engine makes its optimizer.

    Args:
        chunks: this rank's (unwrapped) model chunks; their parameters get the attribute ``lr_scale``.
        scales: part of ``megavlm.models.part.PARTS`` -> factor; 1 for those that are not named.
    """
    assert scales.keys() <= set(PARTS), scales
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.lr_scale = float(scales.get(part_of(name), 1.0))  # type: ignore[attr-defined]
