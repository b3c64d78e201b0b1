"""Tells the operations of a step that serve its result from those that are spent on padding."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from megavlm.batch import Batch
from megavlm.models.config import VLMConfig
from megavlm.models.part import PARTS
from megavlm.planning.flops import count_flops
from megavlm.planning.scope import Flops
from megavlm.recipe import Recipe

COUNTED = (*PARTS, "experts", "router")
"""What is counted apart: the parts of the model, and the two inside ``language``."""


def count_batch(recipe: Recipe, batch: Batch, vocab_size: int) -> tuple[Counter[str], Counter[str]]:
    """Count the operations of both passes of a micro-batch, by :data:`COUNTED`: all of them, and the useful ones.

    Useful is what would be left if every row were as long as its tokens, and its context as long as its tiles' tokens.
    A row in which nothing trains is of no use; nor is what stands in for missing images. Tiles have no padding. Masked
    scores of causal and of packed attention count as they do in :func:`megavlm.planning.flops.count_flops`.

    Args:
        recipe: its model and what trains.
        batch: the micro-batch.
        vocab_size: of the tokenizer.
    """

    def count(one: Batch) -> Counter[str]:
        flops: Flops = count_flops(recipe.model, one, vocab_size=vocab_size, trainable=recipe.training.trained)
        return flops.per_part + flops.inside

    everything = count(batch)
    useful: Counter[str] = Counter()
    if batch.tiles.shape[0]:
        # captions of pairs go through the connector, too
        of_tiles = ["vision"] if recipe.model.learns_from_pairs else ["vision", "connector"]
        useful.update({part: everything[part] for part in of_tiles})
    for row, length in enumerate(row_lengths(batch)):
        useful.update(_count_row(count, recipe.model, batch, row, length))
    # experts with a capacity are rounded up for each row
    return everything, Counter({part: min(useful[part], everything[part]) for part in COUNTED if useful[part]})


def row_lengths(batch: Batch) -> list[int]:
    """Positions of each row before its padding."""
    if batch.row_lengths.numel() == 0:
        return [batch.tokens.shape[1]] * batch.tokens.shape[0]
    return batch.row_lengths.tolist()


def _count_row(
    count: Callable[[Batch], Counter[str]], model: VLMConfig, batch: Batch, row: int, length: int
) -> Counter[str]:
    """The operations for one row without its padding: the decoder's, or those of a pair behind the encoder.

    Cross-attention is of no use to a row without tiles, unless a gated feed-forward layer belongs to it: then it
    counts, as if to one token of context.
    """
    loss_mask = batch.loss_mask[row : row + 1, :length]
    if not loss_mask.any():
        return Counter()
    context_length = int(batch.tile_context[batch.tile_rows == row].sum()) if batch.context_length else 0
    # the tiles stay those of the whole batch: of them depends which gradients are needed
    alone = replace(
        batch,
        tokens=batch.tokens[row : row + 1, :length],
        loss_mask=loss_mask,
        context_length=context_length or min(1, batch.context_length),
    )
    parts = ["connector", "text"] if model.learns_from_pairs else ["language", "experts", "router"]
    if context_length or model.gated_feed_forward is not None:
        parts.append("cross_attention")
    counted = count(alone)
    return Counter({part: counted[part] for part in parts})
