"""Learned positions of a square grid of patches, used at another resolution than they were learned at."""

import torch.nn.functional as F
from torch import Tensor


def stretch(positions: Tensor, side: int) -> Tensor:
    """Stretch positions to another grid; those of that grid come back as they are.

    Bicubic, from patch centre to patch centre, in float32: as transformers' ``interpolate_pos_encoding`` does it.

    Args:
        positions: ``[s * s, D]``, row by row.
        side: patches along a side of the grid that is wanted.

    Returns:
        ``[side * side, D]``, of the dtype of ``positions``.
    """
    learned_side = round(positions.shape[0] ** 0.5)
    if side == learned_side:
        return positions
    grid = positions.float().T.unflatten(1, (learned_side, learned_side))[None]
    stretched = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return stretched[0].flatten(1).T.to(positions.dtype)
