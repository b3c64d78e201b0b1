"""The one thing that passes from data to model: a micro-batch of token rows and image tiles.

It stands below ``data`` and ``models`` so that neither imports the other. Shape letters: N rows, S tokens a row,
T tiles of all images of the batch, I images, H W pixels of a tile, B sample boundaries, C tokens of a row's context
(the keys and values of cross-attention), G tokens of a tag.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TileRoute:
    """How a model takes the tiles of an image; the data lays samples out for it."""

    context_tiles: Literal["none", "regular", "all"] = "none"
    """Tiles that are read by cross-attention: none (their features stand among the tokens), all but the thumbnail (or
    the single tile of an image that has only one), or all."""
    context_tags: Literal["text", "concatenate", "add"] = "text"
    """Where the tag of such a tile goes: into the text, into the context before the tile's features, or onto them."""
    text_sees: Literal["all_images", "last_image"] = "all_images"
    """Which tiles a token of text may see: those of all images before it in its sample, or of the last one only."""

    @property
    def uses_context(self) -> bool:
        """Whether the model has cross-attention at all."""
        return self.context_tiles != "none"


ALL_AMONG_TOKENS = TileRoute()
"""The route of a model without cross-attention."""


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
    """``[N, S, 2]`` int64: half-open range of this batch's tiles that a token may see by cross-attention; tiles in it
    that are not in the context are not seen."""
    tile_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """``[T]`` int64: the row that each tile belongs to; never decreases. It and the two next may be left empty where
    ``context_length`` is 0."""
    tile_context: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """``[T]`` int64: tokens of each tile in its row's context; 0: its features stand among the tokens."""
    tile_tags: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """``[T, G]`` int64: ids of the tag that goes into the context with a tile, -1 behind its end."""
    context_length: int = 0
    """C: each row's context is padded to it; 0 for a model without cross-attention. A batch of texts has a context too
    (of padding), so that every micro-batch runs the same communication."""
    row_lengths: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """``[N]`` int64: tokens of each row before the padding on its right; may be left empty where no row has any."""
    sources: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """``[B]`` int64: the data source that each sample comes from; may be left empty where there is only one."""
    skipped: list[SkippedSample] = field(default_factory=list)
    """Samples whose rows train nothing, with the reasons."""
    keys: list[str] = field(default_factory=list)
    """The samples that are in the rows, as a person can find them; may be left empty by who has no files."""
    num_degraded: int = 0
    """Images that got fewer tiles than the tiling chose, so that their sample fits."""
    num_dropped_images: int = 0
    """Images that were left out so that their sample fits."""
    num_cut_samples: int = 0
    """Samples whose end was cut off so that they fit."""

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one sample."""
        return self.cu_seqlens.numel() - 1 > self.tokens.shape[0]

    @property
    def num_tokens(self) -> Tensor:
        """Tokens without padding, 0-d int64."""
        if self.row_lengths.numel() == 0:
            return torch.tensor(self.tokens.numel(), device=self.tokens.device)
        return self.row_lengths.sum()

    def is_padding(self) -> Tensor | None:
        """Which tokens are padding: ``[N, S]`` bool; None: none."""
        if self.row_lengths.numel() == 0:
            return None
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.row_lengths.unsqueeze(1)

    def sample_of_tokens(self) -> Tensor:
        """Which sample each token belongs to, padding to the sample before it: ``[N, S]`` int64, counted over rows."""
        flat_positions = torch.arange(self.tokens.numel(), device=self.tokens.device)
        samples = torch.searchsorted(self.cu_seqlens.to(torch.int64), flat_positions, right=True) - 1
        return samples.view(self.tokens.shape)

    def source_of_tokens(self) -> Tensor:
        """The data source of each token: ``[N, S]`` int64."""
        if self.sources.numel() == 0:
            return torch.zeros_like(self.tokens)
        return self.sources[self.sample_of_tokens()]

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name, in their declared order."""
        return {
            entry.name: value
            for entry in dataclasses.fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }

    def values(self) -> dict[str, object]:
        """The fields that are no tensors, by name."""
        tensors = self.tensors()
        fields = (entry.name for entry in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in tensors}

    def context_spans(self) -> Tensor:
        """Where each tile stands in the context of its row: ``[T, 2]`` int64, half-open."""
        stops = self.tile_context.cumsum(0)
        totals = torch.zeros(self.tokens.shape[0], dtype=torch.int64, device=stops.device)
        totals.index_add_(0, self.tile_rows, self.tile_context)
        row_starts = totals.cumsum(0) - totals
        stops = stops - row_starts[self.tile_rows]
        return torch.stack([stops - self.tile_context, stops], dim=1)

    def visible_context(self) -> Tensor:
        """What each token may see of its row's context: ``[N, S, 2]`` int64, half-open, ``[0, 0]`` where nothing."""
        first, after_last = self.visible_tiles.unbind(-1)
        if self.tile_context.numel() == 0:
            return torch.zeros_like(self.visible_tiles)
        spans = self.context_spans()
        last_tile = spans.shape[0] - 1
        starts = spans[first.clamp(max=last_tile), 0]
        stops = spans[(after_last - 1).clamp(min=0), 1]
        sees_nothing = (first >= after_last) | (starts >= stops)
        return torch.stack([starts, stops], dim=-1).masked_fill(sees_nothing.unsqueeze(-1), 0)

    def padded_to(self, length: int, context_length: int | None = None) -> "Batch":
        """Return the batch with rows of ``length`` tokens and contexts of ``context_length``; what is added trains
        nothing and is seen by no token."""
        if context_length is not None and context_length != self.context_length:
            assert context_length > self.context_length > 0, (self.context_length, context_length)
            return dataclasses.replace(self, context_length=context_length).padded_to(length)
        num_rows, old_length = self.tokens.shape
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
            row_lengths=self.row_lengths if self.row_lengths.numel() else boundaries.new_full((num_rows,), old_length),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch with every tensor on ``device``."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]
