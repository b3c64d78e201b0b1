"""Image features in the context: the keys and values of cross-attention.

Shape letters: N rows, C tokens of a row's context, T tiles (here those of the context), K tokens of a tile, G tokens of
a tag, H hidden width.
"""

import torch
from torch import Tensor

from megavlm.batch import Batch


def lay_out_context(features: Tensor, tags: Tensor | None, batch: Batch) -> Tensor:
    """Put the tiles of each row behind each other, each behind its tag.

    Args:
        features: ``[T, K, H]`` of the tiles whose ``batch.tile_context`` is not 0.
        tags: ``[G, T, H]`` embeddings of ``batch.tile_tags`` of those tiles (anything behind a tag's end); None: the
            tags do not stand in the context.
        batch: says where each tile goes.

    Returns:
        ``[C, N, H]``, zero where a row has no tile.

    Raises:
        ValueError: the data left another room for a tile than its features and tag take.
    """
    num_rows = batch.tokens.shape[0]
    num_tiles, num_features, width = features.shape
    flat = features.new_zeros(batch.context_length * num_rows, width)
    if num_tiles == 0:
        return flat.view(batch.context_length, num_rows, width)
    chosen = batch.tile_context != 0
    starts, stops = batch.context_spans()[chosen].unbind(1)
    rows = batch.tile_rows[chosen].unsqueeze(1)
    is_tag = batch.tile_tags[chosen] >= 0
    num_before = torch.zeros_like(starts) if tags is None else is_tag.sum(1)
    _check_room(stops - starts, num_before + num_features, num_features)
    places = (starts + num_before).unsqueeze(1) + torch.arange(num_features, device=starts.device)
    flat = flat.index_copy(0, (places * num_rows + rows).flatten(), features.flatten(0, 1))
    if tags is not None:
        places = starts.unsqueeze(1) + torch.arange(is_tag.shape[1], device=starts.device)
        flat = flat.index_copy(0, (places * num_rows + rows)[is_tag], tags.transpose(0, 1)[is_tag])
    return flat.view(batch.context_length, num_rows, width)


def sum_tags(tags: Tensor, batch: Batch) -> Tensor:
    """Add up the embeddings of each tag.

    Args:
        tags: ``[G, T, H]``, as for :func:`lay_out_context`.
        batch: says how long each tag is.

    Returns:
        ``[T, H]``, zero for a tile without a tag.
    """
    is_tag = batch.tile_tags[batch.tile_context != 0] >= 0
    return (tags * is_tag.t().unsqueeze(-1)).sum(0)


def _check_room(room: Tensor, needed: Tensor, num_features: int) -> None:
    wrong = (room != needed).nonzero()
    if wrong.numel():
        tile = int(wrong[0])
        raise ValueError(
            f"batch.tile_context: tile {tile} of the context has room for {int(room[tile])} tokens, but its "
            f"{num_features} features and its tag take {int(needed[tile])}. The data must count with this model's "
            "tokens_per_tile and fusion."
        )
