"""Puts samples into a batch. Shape letters: N rows, S tokens a row, T tiles, I images, B samples."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.batch import Batch, SkippedSample
from megavlm.data.sample import Sample


def collate(
    samples: Sequence[Sample | SkippedSample | None],
    *,
    pad_id: int,
    tile_size: int,
    pad_multiple: int = 1,
    uses_context: bool = False,
) -> Batch:
    """Put each sample in a row of its own.

    Args:
        samples: one for each row. A skipped sample, or ``None``, gives a row of one padding token that trains nothing,
            so that the others keep their places.
        pad_id: token that fills the rows on the right.
        tile_size: side of a tile, in pixels.
        pad_multiple: the longest sample's length, and the longest context, are rounded up to a multiple of it.
        uses_context: the model has cross-attention, whose context is then never empty.

    Returns:
        A batch of ``len(samples)`` rows.
    """
    return pack(
        [[sample] for sample in samples],
        pad_id=pad_id,
        tile_size=tile_size,
        pad_multiple=pad_multiple,
        uses_context=uses_context,
    )


def pack(
    rows: Sequence[Sequence[Sample | SkippedSample | None]],
    *,
    pad_id: int,
    tile_size: int,
    pad_multiple: int = 1,
    uses_context: bool = False,
) -> Batch:
    """Put several samples in each row, one behind the other; positions restart with each, ``cu_seqlens`` bounds them.

    Args:
        rows: the samples of each row. Skipped ones take no room; a row without any other is one padding token.
        pad_id, tile_size, pad_multiple, uses_context: as in :func:`collate`.

    Returns:
        A batch of ``len(rows)`` rows.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("rows=0: a batch needs at least one row. Give micro_batch_size of 1 or more.")
    usable = [[sample for sample in row if isinstance(sample, Sample)] for row in rows]
    longest = max(1, *(sum(sample.num_tokens for sample in row) for row in usable))
    length = -(-longest // pad_multiple) * pad_multiple
    batch = Batch(
        tokens=torch.full((len(rows), length), pad_id, dtype=torch.int64),
        labels=torch.zeros(len(rows), length, dtype=torch.int64),
        loss_mask=torch.zeros(len(rows), length, dtype=torch.float32),
        position_ids=torch.arange(length).repeat(len(rows), 1),
        cu_seqlens=torch.empty(0, dtype=torch.int32),
        tiles=_concatenate_tiles(usable, tile_size),
        tiles_per_image=_concatenate([sample.tiles_per_image for row in usable for sample in row]),
        visible_tiles=torch.zeros(len(rows), length, 2, dtype=torch.int64),
        tile_rows=torch.tensor(
            [index for index, row in enumerate(usable) for sample in row for _ in sample.tiles], dtype=torch.int64
        ),
        tile_context=_concatenate([sample.tile_context for row in usable for sample in row]),
        tile_tags=_concatenate_tags([sample.tile_tags for row in usable for sample in row]),
        context_length=_context_length(usable, pad_multiple) if uses_context else 0,
        row_lengths=torch.tensor([sum(sample.num_tokens for sample in row) for row in usable], dtype=torch.int64),
        skipped=[sample for row in rows for sample in row if isinstance(sample, SkippedSample)],
        keys=[sample.key for row in usable for sample in row],
        num_degraded=sum(sample.num_degraded for row in usable for sample in row),
        num_dropped_images=sum(sample.num_dropped_images for row in usable for sample in row),
        num_cut_samples=sum(sample.is_cut for row in usable for sample in row),
    )
    boundaries = []
    sources = []
    num_tiles = 0
    for row_index, row in enumerate(usable):
        boundaries.append(row_index * length)
        sources.append(row[0].source if row else 0)
        start = 0
        for sample in row:
            stop = start + sample.num_tokens
            if start:
                boundaries.append(row_index * length + start)
                sources.append(sample.source)
            batch.tokens[row_index, start:stop] = sample.tokens
            batch.labels[row_index, start:stop] = sample.labels
            batch.loss_mask[row_index, start:stop] = sample.loss_mask
            batch.position_ids[row_index, start:] = torch.arange(length - start)
            batch.visible_tiles[row_index, start:stop] = sample.visible_tiles + num_tiles
            num_tiles += sample.tiles.shape[0]
            start = stop
        batch.visible_tiles[row_index, start:] = num_tiles  # empty ranges
    batch.cu_seqlens = torch.tensor([*boundaries, len(rows) * length], dtype=torch.int32)
    batch.sources = torch.tensor(sources, dtype=torch.int64)
    return batch


def _context_length(rows: list[list[Sample]], pad_multiple: int) -> int:
    longest = max(1, *(sum(int(sample.tile_context.sum()) for sample in row) for row in rows))
    return -(-longest // pad_multiple) * pad_multiple


def _concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _concatenate_tags(parts: list[Tensor]) -> Tensor:
    longest = max((part.shape[1] for part in parts), default=0)
    padded = [F.pad(part, (0, longest - part.shape[1]), value=-1) for part in parts]
    return torch.cat([torch.empty(0, longest, dtype=torch.int64), *padded])


def _concatenate_tiles(rows: list[list[Sample]], tile_size: int) -> Tensor:
    empty = torch.empty(0, 3, tile_size, tile_size, dtype=torch.uint8)
    return torch.cat([empty, *(sample.tiles for row in rows for sample in row)])
