"""The pairs of a micro-batch: an image and its caption in each row.

Shape letters: N rows, S tokens a row of the batch, L tokens of the longest caption, K queries, T tiles, P features of a
tile, D width, W rows of all data-parallel ranks.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.batch import Batch


@dataclass(frozen=True)
class Pairs:
    """Captions as the Q-Former reads them: without image tokens, from the first position on."""

    text: Tensor
    """``[N, L]`` int64; 0 behind the end."""
    is_text: Tensor
    """``[N, L]`` bool: not behind the end."""
    is_pair: Tensor
    """``[N]`` bool: rows that have something to train. Others stand for samples that could not be read."""
    tiles_of_rows: Tensor
    """``[N]`` int64: 1 or 0."""

    def padded_to(self, length: int) -> "Pairs":
        """The same with captions of ``length`` tokens."""
        added = length - self.text.shape[1]
        return replace(self, text=F.pad(self.text, (0, added)), is_text=F.pad(self.is_text, (0, added)))

    def spread(self, features: Tensor) -> Tensor:
        """Features of the tiles ``[T, P, D]`` -> of the rows ``[N, P, D]``, 0 where a row has no tile."""
        has_tile = self.tiles_of_rows > 0
        if features.shape[0] == has_tile.shape[0]:
            return features  # every row has one
        spread = features.new_zeros(has_tile.shape[0], *features.shape[1:])
        return spread.index_put((has_tile.nonzero().squeeze(1),), features)


def find_pairs(batch: Batch, image_token_id: int, tokens_per_tile: int) -> Pairs:
    """Take the captions out of a micro-batch.

    Args:
        batch: the micro-batch. A row that trains nothing is no pair.
        image_token_id: what stands at the positions of image features.
        tokens_per_tile: K.

    Raises:
        ValueError: the placeholders are not those of the tiles, or a row that trains has no tile or several.
    """
    is_image = batch.tokens == image_token_id
    num_placeholders = is_image.sum(1)
    tiles_of_rows = num_placeholders // tokens_per_tile
    is_pair = (batch.loss_mask > 0).any(1)
    num_tiles = batch.tiles.shape[0]
    if int(num_placeholders.sum()) != num_tiles * tokens_per_tile or bool((num_placeholders % tokens_per_tile).any()):
        raise ValueError(
            f"batch: has {int(num_placeholders.sum())} image tokens, and {num_tiles} tiles give "
            f"{num_tiles * tokens_per_tile}, {tokens_per_tile} in a row. Make batches by the model's tokens_per_tile."
        )
    wrong = (is_pair & (tiles_of_rows != 1)) | (tiles_of_rows > 1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"batch: row {row} has {int(tiles_of_rows[row])} tiles, and model.language.kind='qformer_text' learns from "
            "pairs of one tile and a caption. Use data.tiling.kind: square or whole, and rows of one image."
        )
    is_token = ~is_image
    padding = batch.is_padding()
    if padding is not None:
        is_token &= ~padding
    lengths = is_token.sum(1)
    order = torch.argsort((~is_token).to(torch.uint8), dim=1, stable=True)[:, : max(1, int(lengths.max()))]
    is_text = torch.arange(order.shape[1], device=order.device) < lengths.unsqueeze(1)
    text = batch.tokens.gather(1, order).masked_fill(~is_text, 0)
    return Pairs(text, is_text, is_pair, tiles_of_rows)


def places_in_captions(batch: Batch, image_token_id: int) -> Tensor:
    """For each trained position of a batch, which token of its caption it predicts.

    Returns:
        ``[M, 3]`` int64: row, position in the row, number of the caption's token.
    """
    is_token = batch.tokens != image_token_id
    rows, positions = (batch.loss_mask != 0).nonzero().unbind(1)
    # the position predicts the token behind it, before which stand those up to and including the position
    return torch.stack([rows, positions, is_token.cumsum(1)[rows, positions]], dim=1)


def contrast_and_caption_mask(num_queries: int, is_text: Tensor) -> Tensor:
    """What may not be seen when queries, captions to compare and captions to write go through the layers together.

    The sequence is K queries, the caption behind its class token, the caption behind its decode token (without its last
    token, which predicts nothing). Queries see queries, the first copy sees itself (so image and caption are compared
    unseen by each other), the second sees the queries and what came before.

    Args:
        num_queries: K.
        is_text: ``[N, L]`` bool.

    Returns:
        ``[N, 1, K + 2 L + 1, K + 2 L + 1]`` bool, True where one may not look.
    """
    num_rows, length = is_text.shape
    starts = torch.ones_like(is_text[:, :1])
    to_compare = torch.cat([starts, is_text], dim=1)
    to_write = torch.cat([starts, is_text[:, :-1]], dim=1)
    first, second = num_queries + length + 1, num_queries + 2 * length + 1
    visible = torch.zeros(num_rows, second, second, dtype=torch.bool, device=is_text.device)
    visible[:, :num_queries, :num_queries] = True
    visible[:, num_queries:first, num_queries:first] = to_compare.unsqueeze(1)
    visible[:, first:, :num_queries] = True
    visible[:, first:, first:] = to_write.unsqueeze(1).expand(-1, length, -1).tril()
    return ~visible.unsqueeze(1)


def matching_mask(num_queries: int, is_text: Tensor) -> Tensor:
    """What may not be seen when an image and a caption are judged: padding only.

    Args:
        num_queries: K.
        is_text: ``[N, L]`` bool.

    Returns:
        ``[N, 1, 1, K + 1 + L]`` bool, True where one may not look; for all who look.
    """
    always = torch.ones(is_text.shape[0], num_queries + 1, dtype=torch.bool, device=is_text.device)
    return ~torch.cat([always, is_text], dim=1)[:, None, None]
