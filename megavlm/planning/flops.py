"""Counts the floating-point operations of a training step from shapes alone, part by part.

Only matrix products count, 2 m n k each; norms, activations, softmax, rotary positions and the optimizer are left out.
Attention counts in full, causal and packed rows too (half and more of their scores are masked), as
``torch.utils.flop_counter`` does, so that numbers compare with other stacks'. What the model computes whatever the
batch holds counts: padded rows of the vocabulary, and what stands in for missing images and trained tokens.

The backward pass counts the gradients that a trained parameter asks for, and nothing else: a matrix's where it trains
itself, an input's where anything trains before it, be it a norm, a bias or learned queries. Each parameter is asked for
by its name (that of the torch layers, as ``megavlm plan --modules`` has it), so modules that train alone count exactly.
Left out is what recomputation or a fused kernel computes a second time, and what is computed and used by nothing:
layers before the first trained parameter, which run because pipeline stages pass a gradient on; the gradient that
megatron-core's linear layers compute of every input if their weight or bias trains; the one of the two gradients of its
router that is not asked for; what a fused attention computes where only one of queries, keys and values asks. The whole
model counts, however it is split over ranks; heads that a layout adds do not.

Of experts those count that tokens go to, padding of a row included, which goes to experts as well. Where they have a
capacity, as many tokens count as there is room for: how many are dropped below that only the router knows. The experts
of a layer train together: if one does, all count.
"""

from collections.abc import Collection

from megavlm.batch import Batch
from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.config import VLMConfig, model_vocab_size
from megavlm.models.connectors import FeatureShape
from megavlm.models.connectors.qformer import QFormerConfig
from megavlm.models.part import PARTS, Trainable
from megavlm.planning.decoder_flops import count_decoder
from megavlm.planning.pair_flops import count_pairs
from megavlm.planning.scope import Flops, Scope
from megavlm.planning.vision_flops import count_vision


def count_flops(model: VLMConfig, batch: Batch, *, vocab_size: int, trainable: Trainable | Collection[str]) -> Flops:
    """Count the operations of the forward and the backward pass of one micro-batch.

    Args:
        model: the whole model.
        batch: the micro-batch; only its shapes, its trained tokens and the places of its tiles matter. On a GPU this
            waits for it; count before the batch goes there.
        vocab_size: tokens of the tokenizer, image token included.
        trainable: what trains, or the names of whole parts (of ``megavlm.models.part.PARTS``). With nothing there is no
            backward pass.

    Raises:
        ValueError: ``trainable`` names no part of a model, the batch was made for another fusion, or the tokenizer has
            more tokens than the model's vocabulary.
    """
    trained = trainable if isinstance(trainable, Trainable) else Trainable(frozenset(trainable))
    _check(model, batch, trained)
    num_tiles = batch.tiles.shape[0]
    # A batch of texts sends a blank tile through encoder and connector, each if it trains or has a gradient to pass on.
    vision, connector, rest = (Scope(trained) for _ in range(3))
    features = count_vision(vision.within("vision"), model.vision, max(1, num_tiles))
    flops = vision.flops if num_tiles or features else Flops()
    if model.learns_from_pairs:
        _count_pairs(rest, model, batch, vocab_size, features)
        return flops + rest.flops
    shape = FeatureShape(
        max(1, num_tiles), model.vision.num_patches, model.vision.hidden_size, model.decoder.hidden_size
    )
    tokens = model.connector.count_products(connector.within("connector"), shape, features)
    if num_tiles or tokens:
        flops += connector.flops
    # Embeddings are looked up: no product. A blank tile's features are added to them.
    words = rest.trains("language.embedding.word_embeddings.weight")
    joins_tokens = num_tiles == 0 or bool((batch.tile_context == 0).any())
    count_decoder(
        rest.within("language"),
        model,
        batch,
        vocab_size,
        embeddings=words or (tokens and joins_tokens),
        context=model.fusion.tile_route.uses_context and _needs_context(rest, model, batch, words, tokens),
    )
    return flops + rest.flops


def _check(model: VLMConfig, batch: Batch, trained: Trainable) -> None:
    unknown = sorted(trained.parts.difference(PARTS))
    if unknown:
        raise ValueError(
            f"trainable={sorted(trained.parts)}: has no part {unknown[0]!r}. Choose from {', '.join(PARTS)}."
        )
    if model.fusion.tile_route.uses_context != (batch.context_length > 0):
        raise ValueError(
            f"batch.context_length={batch.context_length}: the model has {len(model.cross_attention_layers)} layers "
            "with cross-attention. Make batches by the model's tile_route."
        )


def _needs_context(scope: Scope, model: VLMConfig, batch: Batch, words: bool, tokens: bool) -> bool:
    """Whether the context's gradient is needed: of its norm, the tiles' tokens, the words of tags."""
    has_tags = model.fusion.tile_route.context_tags != "text"
    has_tiles = bool((batch.tile_context != 0).any())
    return scope.norm("context_layernorm", has_tiles and (tokens or (has_tags and words)), bias=False)


def _count_pairs(scope: Scope, model: VLMConfig, batch: Batch, vocab_size: int, needs_features: bool) -> None:
    assert isinstance(model.language, QFormerTextConfig)
    assert isinstance(model.connector, QFormerConfig)
    num_pairs, width = batch.tokens.shape[0], model.connector.hidden_size
    count_pairs(
        scope,
        model.language,
        model.connector,
        FeatureShape(num_pairs, model.vision.num_patches, model.vision.hidden_size, width),
        caption_length=batch.tokens.shape[1] - model.tokens_per_tile,
        num_trained=max(1, int(batch.loss_mask.count_nonzero())),
        vocab_size=model_vocab_size(model.language, vocab_size),
        needs_features=needs_features,
    )
