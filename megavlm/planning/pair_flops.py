"""Operations of BLIP-2's first stage, product by product as ``models/blip2`` computes them.

Left out: the similarities of a micro-batch, which depend on how many pairs all ranks have together. Shape letters: N
pairs, K queries, L tokens of a caption, P features of a tile.
"""

from typing import Protocol

from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.connectors.qformer import QFormerConfig


class Walk(Protocol):
    """What adds up, as :mod:`megavlm.planning.flops` has it."""

    def trains(self, *parts: str) -> bool:
        """Whether any of the parts trains."""

    def linear(self, part: str, num_vectors: int, input_size: int, output_size: int, needs_input: bool) -> bool:
        """A weight matrix. Return whether the output needs a gradient."""

    def attention(self, part: str, num_scores: int, width: int, needs_query: bool, needs_key_value: bool) -> bool:
        """Scores and weighted values. Return as :meth:`linear`."""


def walk_pairs(
    walk: Walk,
    text: QFormerTextConfig,
    qformer: QFormerConfig,
    *,
    num_pairs: int,
    caption_length: int,
    num_trained: int,
    num_patches: int,
    input_size: int,
    vocab_size: int,
    features: bool,
) -> None:
    """Add what the Q-Former and its text side do with pairs.

    Args:
        walk: adds up.
        text: config of the text side.
        qformer: of the connector.
        num_pairs: N.
        caption_length: L.
        num_trained: tokens of captions that are learned.
        num_patches: P.
        input_size: width of the features.
        vocab_size: tokens of the vocabulary.
        features: whether the features need a gradient.
    """
    width, num_queries = qformer.hidden_size, qformer.num_tokens
    for rows, num_text in ((num_pairs, 2 * caption_length + 1), (3 * num_pairs, caption_length + 1)):
        _walk_layers(walk, qformer, rows, num_text, rows * num_patches, input_size, features)
    needs = features or walk.trains("connector", "text")
    walk.linear("text", num_pairs * num_queries, width, text.contrast_size, needs)
    walk.linear("text", num_pairs, width, text.contrast_size, needs)
    walk.linear("text", 3 * num_pairs * num_queries, width, 2, needs)
    walk.linear("text", num_trained, width, width, needs)
    walk.linear("text", num_trained, width, vocab_size, needs)


def _walk_layers(
    walk: Walk, qformer: QFormerConfig, rows: int, num_text: int, num_features: int, input_size: int, features: bool
) -> None:
    """One pass of rows of queries and text through all layers."""
    width, num_queries = qformer.hidden_size, qformer.num_tokens
    length = num_queries + num_text
    needs = walk.trains("connector", "text")  # of the queries and the embeddings
    for layer in range(qformer.num_layers):
        for _ in range(3):
            walk.linear("connector", rows * length, width, width, needs)
        walk.attention("connector", rows * length**2, width, needs, needs)
        walk.linear("connector", rows * length, width, width, needs)
        if qformer.has_cross_attention(layer):
            reads = features or walk.trains("connector")
            walk.linear("connector", rows * num_queries, width, width, needs)
            for _ in range(2):
                walk.linear("connector", num_features, input_size, width, features)
            walk.attention("connector", num_features * num_queries, width, needs, reads)
            needs = needs or reads
            walk.linear("connector", rows * num_queries, width, width, needs)
        for part, count in (("connector", rows * num_queries), ("text", rows * num_text)):
            walk.linear(part, count, width, qformer.ffn_hidden_size, needs)
            walk.linear(part, count, qformer.ffn_hidden_size, width, needs)
