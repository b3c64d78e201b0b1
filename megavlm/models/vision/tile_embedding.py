"""Tiles to the first hidden states of a vision transformer: normalise, cut into patches, project, add positions.

Shape letters: T tiles, P patches of a tile, D hidden width, C = 3 * patch_size ** 2 values of a patch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.models.learned_positions import stretch
from megavlm.runtime import current_device


class TileEmbedding(torch.nn.Module):
    """Patch projection, class token and learned positions.

    The projection is a convolution with stride = kernel size, kept in that shape (``[D, 3, p, p]``, as every published
    encoder stores it) and computed as one matrix product over unfolded patches, which adds in the same order. Positions
    that were learned on a larger or smaller grid than the tile's are kept as they were learned and stretched to it.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        has_bias: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        dtype: torch.dtype,
        position_side: int | None = None,
        has_class_token: bool = True,
    ) -> None:
        """Make the parameters (uninitialised).

        Args:
            image_size: side of a tile, pixels. Pixels at the right and at the bottom that do not fill a patch are left
                out, as the convolution does.
            patch_size: side of a patch, pixels.
            hidden_size: D.
            has_bias: whether the projection has a bias.
            image_mean, image_std: of each colour, on the scale 0 to 1.
            dtype: of the parameters and of the result.
            position_side: patches along a side of the grid of the learned positions; None: of the tile's.
            has_class_token: whether a learned token stands before the patches.
        """
        super().__init__()
        self.image_size = image_size
        self.patch_size = patch_size
        self.position_side = position_side or image_size // patch_size
        device = current_device()
        self.weight = _parameter((hidden_size, 3, patch_size, patch_size), dtype, device)
        self.bias = _parameter((hidden_size,), dtype, device) if has_bias else None
        self.class_token = _parameter((hidden_size,), dtype, device) if has_class_token else None
        self.positions = _parameter((self.position_side**2 + has_class_token, hidden_size), dtype, device)
        # Not buffers: those would be cast to bfloat16 with the parameters, which moves pixel values by up to 0.4 %.
        self._pixel_scale = torch.tensor([1 / (255 * std) for std in image_std], device="cpu")
        self._pixel_shift = torch.tensor(
            [-mean / std for mean, std in zip(image_mean, image_std, strict=True)], device="cpu"
        )

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed tiles.

        Args:
            tiles: ``[T, 3, H, W]``: uint8 pixels, or floats already normalised.

        Returns:
            ``[P + 1, T, D]``, class token first, patches row by row (megatron-core's sequence-first layout); ``[P, T,
            D]`` without a class token.

        Raises:
            ValueError: the tiles have another shape than the encoder takes.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(tiles.shape[1:]) != expected:
            raise ValueError(
                f"tiles.shape={tuple(tiles.shape)}: the encoder takes [T, {', '.join(map(str, expected))}]. "
                "Set data's tile size to model.vision.image_size."
            )
        patches = self._patches(tiles)
        features = F.linear(patches, self.weight.flatten(1), self.bias) + self._patch_positions()[:, None]
        if self.class_token is None:
            return features
        first = (self.class_token + self.positions[0]).expand(1, tiles.shape[0], -1)
        return torch.cat((first, features))

    def _patch_positions(self) -> Tensor:
        """``[P, D]``: the learned positions, stretched to the tile's grid if theirs is another."""
        positions = self.positions if self.class_token is None else self.positions[1:]
        return stretch(positions, self.image_size // self.patch_size)

    def _patches(self, tiles: Tensor) -> Tensor:
        """``[T, 3, H, W]`` -> normalised ``[P, T, C]``, in the parameters' dtype.

        Pixels are moved while they are still bytes, then normalised by one fused multiply and add.
        """
        size, side = self.patch_size, self.image_size // self.patch_size
        num_tiles = tiles.shape[0]
        tiles = tiles[..., : side * size, : side * size]
        patches = tiles.reshape(num_tiles, 3, side, size, side, size).permute(2, 4, 0, 1, 3, 5)
        patches = patches.reshape(side * side, num_tiles, 3, size * size)
        if not tiles.is_floating_point():
            if self._pixel_scale.device != tiles.device:
                self._pixel_scale = self._pixel_scale.to(tiles.device)
                self._pixel_shift = self._pixel_shift.to(tiles.device)
            patches = torch.addcmul(self._pixel_shift[:, None], patches.float(), self._pixel_scale[:, None])
        return patches.flatten(2).to(self.weight.dtype)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
