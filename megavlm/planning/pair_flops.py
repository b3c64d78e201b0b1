"""Operations of BLIP-2's first stage, product by product as ``models/blip2`` computes them.

Left out: the similarities of a micro-batch, which depend on how many pairs all ranks have together. Shape letters: N
pairs, K queries, L tokens of a caption.
"""

from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.connectors import FeatureShape, Products
from megavlm.models.connectors.qformer import QFormerConfig


def count_pairs(
    model: Products,
    config: QFormerTextConfig,
    qformer: QFormerConfig,
    shape: FeatureShape,
    *,
    caption_length: int,
    num_trained: int,
    vocab_size: int,
    needs_features: bool,
) -> None:
    """Tell the products of the Q-Former and its text side.

    Args:
        model: takes them, of the whole model.
        config: of the text side.
        qformer: of the connector.
        shape: of the features, of a tile for each of the N pairs.
        caption_length: L.
        num_trained: tokens of captions that are learned.
        vocab_size: tokens of the vocabulary.
        needs_features: whether the features' gradient is needed.
    """
    text, num_pairs = model.within("text"), shape.num_tiles
    width, num_queries = qformer.hidden_size, num_pairs * qformer.num_tokens

    def read(num_rows: int, num_text: int) -> bool:
        embeddings = text.trains("word_embeddings", "start_embeddings", "position_embeddings")
        connector, rows = model.within("connector"), shape._replace(num_tiles=num_rows)
        states = embeddings or connector.trains("queries")
        return qformer.count_layers(connector, rows, states, needs_features, num_text=num_text)

    states = read(num_pairs, 2 * caption_length + 1)
    text.linear("image_projection", num_queries, width, config.contrast_size, states)
    text.linear("text_projection", num_pairs, width, config.contrast_size, states)
    transformed = text.norm("caption_norm", text.linear("caption_transform", num_trained, width, width, states))
    text.matrix(["word_embeddings"], num_trained, width, vocab_size, transformed)
    judged = read(3 * num_pairs, caption_length + 1)
    text.linear("matching_head", 3 * num_queries, width, 2, judged)
