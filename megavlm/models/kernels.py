"""Parts of a layer that torch's CPU does in many passes over memory, written by hand in few.

Each is an autograd function that equals its torch counterpart up to rounding and saves less for the backward pass.
Shape letters: S queries, L keys, N rows, H query heads, G key/value heads, D channels of a head, B query heads of one
key/value head (H / G).
"""

import functools
from typing import Any

import torch
from torch import Tensor

_MOST_SCORES = 1 << 20
"""Scores held at a time, and most of one head: 2 MiB of bfloat16, about a core's cache."""


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last dimension; statistics and products are float32.

    Args:
        states: ``[..., width]``.
        weight: ``[width]``.
        eps: added to the mean square.
    """
    return _RMSNorm.apply(states, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(states.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return (states * inverse).mul_(weight).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        states, weight, inverse = ctx.saved_tensors
        grad = grad.float()
        normed = states * inverse  # float32, by promotion
        weighted = grad * normed
        grad_weight = weighted.flatten(0, -2).sum(0).to(weight.dtype)
        along = (weighted @ weight.float()).unsqueeze(-1).div_(states.shape[-1])
        grad_states = (grad * weight).sub_(normed.mul_(along)).mul_(inverse)
        return grad_states.to(states.dtype), grad_weight, None


def takes_short_attention(query: Tensor, key: Tensor) -> bool:
    """Whether :func:`short_attention` is the faster one: bfloat16 on a CPU, with scores that fit its cache."""
    return (
        query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[0] * key.shape[0] <= _MOST_SCORES
    )


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Attention as plain matrix products, a few heads at a time; the backward pass computes the scores again.

    torch's CPU attention converts every block of a bfloat16 product to float32 and back; whole matrix products run on
    the processor's bfloat16 units. As in megatron-core's unfused attention, scores are rounded to bfloat16 before the
    softmax.

    Args:
        query: ``[S, N, H, D]``.
        key, value: ``[L, N, G, D]`` with H a multiple of G.
        mask: ``[N or 1, 1, S, L]`` bool, True where a token may not look, or None.
        is_causal: a token may not look at later ones; then S equals L and ``mask`` is None.
        scale: of the scores.

    Returns:
        ``[S, N, H * D]``.
    """
    repeats = query.shape[2] // key.shape[2]
    if is_causal:
        added = _causal_mask(query.shape[0], repeats, query.dtype)
    elif mask is not None:
        added = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(mask, float("-inf")).repeat(1, 1, repeats, 1)
    else:
        added = None
    return _ShortAttention.apply(query, key, value, added, scale)


@functools.lru_cache(maxsize=8)
def _causal_mask(length: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores ``[1, 1, B * S, S]``: -inf above the diagonal."""
    return torch.full((1, 1, length, length), float("-inf"), dtype=dtype).triu_(1).repeat(1, 1, repeats, 1)


class _ShortAttention(torch.autograd.Function):
    """Tensors inside are ``[R, M, B * S or L, D]``: R masks, each for M pairs of a row and a key/value head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float) -> Tensor:
        num_masks = 1 if added is None else added.shape[0]
        ctx.scale, ctx.query_shape, ctx.key_shape = scale, query.shape, key.shape
        query, key, value = (_by_pair(states, num_masks, key.shape) for states in (query, key, value))
        ctx.save_for_backward(query, key, value, added)
        attended = torch.empty_like(query)
        for part in _parts(query, key):
            torch.bmm(_weights(query, key, added, part, scale), value[part], out=attended[part])
        return _by_token(attended, ctx.query_shape).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, added = ctx.saved_tensors
        grad = _by_pair(grad.unflatten(2, ctx.query_shape[2:]), query.shape[0], ctx.key_shape)
        grad_query, grad_key, grad_value = (torch.empty_like(states) for states in (query, key, value))
        for part in _parts(query, key):
            weights = _weights(query, key, added, part, ctx.scale)
            torch.bmm(weights.transpose(1, 2), grad[part], out=grad_value[part])
            grad_weights = torch.bmm(grad[part], value[part].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            for target, left, right in (
                (grad_query[part], grad_scores, key[part]),
                (grad_key[part], grad_scores.transpose(1, 2), query[part]),
            ):
                torch.baddbmm(target, left, right, beta=0, alpha=ctx.scale, out=target)
        return (
            _by_token(grad_query, ctx.query_shape),
            _by_token(grad_key, ctx.key_shape),
            _by_token(grad_value, ctx.key_shape),
            None,
            None,
        )


def _by_pair(states: Tensor, num_masks: int, key_shape: torch.Size) -> Tensor:
    """``[S, N, H, D]`` (or ``[L, N, G, D]``) -> contiguous ``[R, M, B * S, D]``."""
    num_pairs = key_shape[1] * key_shape[2]
    by_head = states.permute(1, 2, 0, 3)
    return by_head.reshape(num_masks, num_pairs // num_masks, -1, states.shape[-1]).contiguous()


def _by_token(states: Tensor, shape: torch.Size) -> Tensor:
    """The way back, as a view of ``shape``."""
    length, num_rows, num_heads, width = shape
    return states.view(num_rows, num_heads, length, width).permute(2, 0, 1, 3)


def _parts(query: Tensor, key: Tensor) -> list[tuple[int, slice]]:
    """Indices that cut the pairs into parts of at most ``_MOST_SCORES`` scores (or one pair)."""
    step = max(1, _MOST_SCORES // (query.shape[2] * key.shape[2]))
    return [(mask, slice(i, i + step)) for mask in range(query.shape[0]) for i in range(0, query.shape[1], step)]


def _weights(query: Tensor, key: Tensor, added: Tensor | None, part: tuple[int, slice], scale: float) -> Tensor:
    """Attention weights of some pairs: softmax(scale * query @ key + added)."""
    start = query.new_empty(1) if added is None else added[part[0]]
    beta = 0 if added is None else 1
    return torch.baddbmm(start, query[part], key[part].transpose(1, 2), beta=beta, alpha=scale).softmax(-1)
