"""The most that a row of a recipe's training data can be."""

import torch

from megavlm.batch import Batch
from megavlm.data.expansion import route_image
from megavlm.recipe import Recipe


def full_row(recipe: Recipe) -> Batch:
    """Make a row of ``data.seq_length`` tokens with one image of the most tiles; all tokens of text train.

    Tags count as text (those that go into the context are left out: they depend on the tokenizer).
    """
    size = recipe.model.vision.image_size
    tiling = recipe.data.tiling.build(size)
    layout = tiling.layout(tiling.max_tiles * size, size)
    route = recipe.model.fusion.tile_route
    image = route_image([()] * layout.num_tiles, layout, recipe.model.tokens_per_tile, route)
    length, num_image_tokens = recipe.data.seq_length, image.num_tokens
    context = [tile.context_length for tile in image.tiles]
    loss_mask = torch.ones(1, length)
    loss_mask[:, :num_image_tokens] = 0.0
    return Batch(
        tokens=torch.zeros(1, length, dtype=torch.int64),
        labels=torch.zeros(1, length, dtype=torch.int64),
        loss_mask=loss_mask,
        position_ids=torch.arange(length)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        tiles=torch.zeros(layout.num_tiles, 3, size, size, dtype=torch.uint8),
        tiles_per_image=torch.tensor([layout.num_tiles]),
        visible_tiles=torch.tensor([0, layout.num_tiles]).repeat(1, length, 1),
        tile_rows=torch.zeros(layout.num_tiles, dtype=torch.int64),
        tile_context=torch.tensor(context),
        tile_tags=torch.zeros(layout.num_tiles, 0, dtype=torch.int64),
        context_length=max(1, sum(context)) if route.uses_context else 0,
    )
