"""Which parts of a model train in a stage."""

from collections.abc import Iterable, Sequence

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
