"""Image features in the context: the keys and values of cross-attention.

Shape letters: N rows, C tokens of a row's context, T tiles (here those of the context), K tokens of a tile, G tokens of
a tag, H hidden width.
"""

import torch
from torch import Tensor

from megavlm.batch import Batch


def lay_out_context(features: Tensor, tags: Tensor | None, batch: Batch, *, adds_tags: bool) -> Tensor:
    """Put the tiles of each row behind each other, with their tags.

    Args:
        features: ``[T, K, H]`` of the tiles whose ``batch.tile_context`` is not 0.
        tags: ``[G, T, H]`` embeddings of ``batch.tile_tags`` of those tiles (anything behind a tag's end); None: the
            context holds no tags.
        batch: says where each tile goes.
        adds_tags: the sum of a tag's embeddings is added to its tile's features; otherwise the tag stands before them.

    Returns:
        ``[C, N, H]``, zero where a row has no tile.

    Raises:
        ValueError: the data left another room for a tile than its features and tag take.
    """
    num_rows = batch.tokens.shape[0]
    chosen = batch.tile_context != 0
    starts, stops = batch.context_spans()[chosen].unbind(1)
    num_tiles, num_features, width = features.shape
    flat = features.new_zeros(batch.context_length * num_rows, width)
    if num_tiles == 0:
        return flat.view(batch.context_length, num_rows, width)
    is_tag = batch.tile_tags[chosen] >= 0
    num_before = torch.zeros_like(starts)
    if tags is not None and adds_tags:
        features = features + (tags * is_tag.t().unsqueeze(-1)).sum(0).unsqueeze(1)
    elif tags is not None:
        num_before = is_tag.sum(1)
    _check_room(stops - starts, num_before + num_features, num_features)
    rows = batch.tile_rows[chosen].unsqueeze(1)
    places = starts.unsqueeze(1) + num_before.unsqueeze(1) + torch.arange(num_features, device=starts.device)
    flat = flat.index_copy(0, (places * num_rows + rows).flatten(), features.flatten(0, 1))
    if tags is not None and not adds_tags:
        places = starts.unsqueeze(1) + torch.arange(is_tag.shape[1], device=starts.device)
        flat = flat.index_copy(0, (places * num_rows + rows)[is_tag], tags.transpose(0, 1)[is_tag].to(flat.dtype))
    return flat.view(batch.context_length, num_rows, width)


def _check_room(room: Tensor, needed: Tensor, num_features: int) -> None:
    wrong = (room != needed).nonzero()
    if wrong.numel():
        tile = int(wrong[0])
        raise ValueError(
            f"batch.tile_context: tile {tile} of the context has room for {int(room[tile])} tokens, but its "
            f"{num_features} features and its tag take {int(needed[tile])}. The data must count with this model's "
            "tokens_per_tile and fusion."
        )
