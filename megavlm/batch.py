"""The one thing that passes from data to model: a micro-batch of token rows and image tiles.

It stands below ``data`` and ``models`` so that neither imports the other. Shape letters: N rows, S tokens a row,
T tiles of all images of the batch, I images, H W pixels of a tile, B sample boundaries.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be used; its row in the batch trains nothing."""

    key: str
    """Which one, as a person can find it: ``file.jsonl:17``."""
    reason: str
    """Short and countable: ``image_unreadable``, ``image_too_large``, ``over_length``, ``row_malformed`` ..."""
    message: str
    """What is wrong, with the numbers."""


@dataclass
class Batch:
    """A micro-batch. Image placeholders and tile tags are already expanded; the model adds no token.

    Text-only rows, rows with several images, rows of several packed samples and rows that train nothing are all
    normal. ``T`` and ``I`` may be 0.
    """

    tokens: Tensor
    """``[N, S]`` int64. Positions that hold an image feature carry the tokenizer's image token."""
    labels: Tensor
    """``[N, S]`` int64: the token that each position predicts (already shifted); 0 where ``loss_mask`` is 0."""
    loss_mask: Tensor
    """``[N, S]`` float32: weight of each position's loss; 0 on prompts, tags, image tokens and padding."""
    position_ids: Tensor
    """``[N, S]`` int64: position of each token in its own sample."""
    cu_seqlens: Tensor
    """``[B + 1]`` int32: sample boundaries in the flattened ``N * S`` tokens, padding counted with the sample before
    it. Every row starts a sample."""
    tiles: Tensor
    """``[T, 3, H, W]`` uint8, RGB: the tiles of all images in the order of their placeholders (row by row)."""
    tiles_per_image: Tensor
    """``[I]`` int64: thumbnail included; sums to ``T``."""
    visible_tiles: Tensor
    """``[N, S, 2]`` int64: half-open range of this batch's tiles that a token may see by cross-attention."""
    skipped: list[SkippedSample] = field(default_factory=list)
    """Samples whose rows train nothing, with the reasons."""
    num_degraded: int = 0
    """Images that got fewer tiles than the tiling chose, so that their sample fits."""

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one sample."""
        return self.cu_seqlens.numel() - 1 > self.tokens.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name, in their declared order."""
        return {
            entry.name: value
            for entry in dataclasses.fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }

    def padded_to(self, length: int) -> "Batch":
        """Return the batch with rows of ``length`` tokens; what is added trains nothing."""
        old_length = self.tokens.shape[1]
        added = length - old_length
        assert added >= 0, (length, old_length)
        if added == 0:
            return self
        boundaries = self.cu_seqlens.to(torch.int64)
        moved = boundaries // old_length * length + boundaries % old_length
        more_positions = self.position_ids[:, -1:] + torch.arange(1, added + 1, device=self.tokens.device)
        return dataclasses.replace(
            self,
            tokens=F.pad(self.tokens, (0, added)),
            labels=F.pad(self.labels, (0, added)),
            loss_mask=F.pad(self.loss_mask, (0, added)),
            position_ids=torch.cat([self.position_ids, more_positions], dim=1),
            cu_seqlens=moved.to(self.cu_seqlens.dtype),
            visible_tiles=F.pad(self.visible_tiles, (0, 0, 0, added)),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch with every tensor on ``device``."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return Batch(**moved, skipped=self.skipped, num_degraded=self.num_degraded)
