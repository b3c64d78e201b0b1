"""Attention under a mask of tokens by tokens, for packed rows on a GPU: FlexAttention skips blocks that nobody sees.

Shape letters: S tokens, N rows, H heads (of this tensor-parallel rank), G key/value groups, D channels of a head.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention compiled; uncompiled it would hold all scores."""
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def can_compile() -> bool:
    """Whether torch can compile kernels for a GPU: Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def takes_blocks(query: Tensor, mask: Tensor) -> bool:
    """Whether :func:`attend_in_blocks` is the faster one: a GPU, and tokens that attend to their own row."""
    return query.device.type == "cuda" and mask.shape[-1] == mask.shape[-2] == query.shape[0] and can_compile()


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    flex: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attend through FlexAttention.

    Args:
        query: ``[S, N, H, D]``.
        key, value: ``[S, N, G, D]`` with H a multiple of G.
        mask: ``[N or 1, 1, S, S]`` bool, True where a token may not look. Every token sees at least one.
        scale: of the scores; None: 1 / sqrt(D).
        flex: the attention; :func:`compiled_flex_attention` by default.

    Returns:
        ``[S, N, H * D]``.
    """
    attended = (flex or compiled_flex_attention())(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        block_mask=_KEPT.get(mask),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.permute(2, 0, 1, 3).flatten(2)


class _KeptBlocks:
    """Keeps the newest mask as blocks: all layers of a micro-batch ask for the same one, in recomputation too."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._blocks: BlockMask | None = None

    def get(self, mask: Tensor) -> BlockMask:
        """Return the block mask of a ``[N or 1, 1, S, S]`` mask."""
        kept = self._mask
        # the kept mask holds its memory, so another one cannot lie at the same place
        is_kept = kept is not None and kept.data_ptr() == mask.data_ptr() and kept.shape == mask.shape
        if self._blocks is None or not is_kept:
            self._mask, self._blocks = mask, _blocks_of(mask)
        return self._blocks


_KEPT = _KeptBlocks()


def _blocks_of(mask: Tensor) -> BlockMask:
    num_masks, _, length, _ = mask.shape

    def sees(row: Tensor, head: Tensor, token: Tensor, other: Tensor) -> Tensor:
        return ~mask[row if num_masks > 1 else 0, 0, token, other]

    return create_block_mask(sees, num_masks, None, length, length, device=str(mask.device))
