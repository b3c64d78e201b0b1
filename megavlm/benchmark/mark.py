"""Tells when a backward pass comes to a place of the model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mark_gradients(values: tuple[Any, ...], on_gradients: Callable[[], None]) -> tuple[Any, ...]:
    """Pass values on; call ``on_gradients`` once when the gradients of those that need one are all there."""
    places = [place for place, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values
    marked = list(values)
    for place, value in zip(places, _Mark.apply(on_gradients, *(values[place] for place in places)), strict=True):
        marked[place] = value
    return tuple(marked)


class _Mark(torch.autograd.Function):
    """Identity that tells when it is gone through backward."""

    @staticmethod
    def forward(ctx: Any, on_gradients: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.on_gradients = on_gradients
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.on_gradients()
        return (None, *gradients)
