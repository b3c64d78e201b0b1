"""Image features in the sequence of the language model.

Shape letters: N rows, S tokens a row, T tiles, K tokens of a tile, H hidden width.
"""

import torch
from torch import Tensor


def fill_placeholders(embeddings: Tensor, features: Tensor, tokens: Tensor, image_token_id: int) -> Tensor:
    """Put image features where the placeholders stand.

    Args:
        embeddings: ``[S, N, H]`` of all tokens.
        features: ``[T, K, H]``, tiles in the order of their placeholders.
        tokens: ``[N, S]`` int64.
        image_token_id: id of the placeholder token.

    Returns:
        ``[S, N, H]``.

    Raises:
        ValueError: the tokens hold another number of placeholders than the tiles have features.
    """
    rows, columns = (tokens == image_token_id).nonzero(as_tuple=True)
    num_features = features.shape[0] * features.shape[1]
    if rows.numel() != num_features:
        raise ValueError(
            f"batch.tokens: hold {rows.numel()} image placeholders (token {image_token_id}), but "
            f"{features.shape[0]} tiles of {features.shape[1]} tokens give {num_features} features. The data must "
            "expand placeholders with this model's tokens_per_tile and fusion."
        )
    if num_features == 0:
        return embeddings
    return torch.index_put(embeddings, (columns, rows), features.flatten(0, 1).to(embeddings.dtype))
