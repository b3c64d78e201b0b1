"""Counts the floating-point operations of a training step from shapes alone, part by part.

Only matrix products count, 2 m n k each; norms, activations, softmax, rotary positions and the optimizer are left out.
Attention counts in full, causal and packed rows too (half and more of their scores are masked), as
``torch.utils.flop_counter`` does, so that numbers compare with other stacks'. What the model computes whatever the
batch holds counts: padded rows of the vocabulary, and what stands in for missing images and trained tokens.

The backward pass counts the gradients that a trained weight asks for, and nothing else: not what recomputation or a
fused kernel computes a second time, and not what is computed and used by nothing (layers before the first trained
weight, which run because pipeline stages pass a gradient on; the gradient that megatron-core's trained linear layers
compute of every input, and its router of its weight, trained or not). The whole model counts, however it is split over
ranks; heads that a layout adds do not.

Of experts those count that tokens go to, padding of a row included, which goes to experts as well. Where they have a
capacity, as many tokens count as there is room for: how many are dropped below that only the router knows.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megavlm.batch import Batch
from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.config import VLMConfig, model_vocab_size
from megavlm.models.connectors import AnyConnectorConfig, FeatureShape
from megavlm.models.connectors.qformer import QFormerConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import MoEConfig
from megavlm.models.part import PARTS
from megavlm.models.vision.transformer import VisionTransformerConfig
from megavlm.planning.experts import expert_width
from megavlm.planning.pair_flops import walk_pairs


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per part: ``vision``, ``connector``, ``cross_attention``, ``language``.

    LoRA counts as ``language``. A part that does nothing has no entry, and reads as 0.
    """

    forward: Counter[str]
    """Of the forward pass."""
    backward: Counter[str]
    """Of the backward pass: gradients of trained weights, and of everything between them and the loss."""
    inside: Counter[str] = field(default_factory=Counter)
    """Both passes of ``experts`` and ``router``, which count as ``language`` above."""

    @property
    def per_part(self) -> Counter[str]:
        """Both passes together."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """Both passes of all parts."""
        return self.forward.total() + self.backward.total()

    def __add__(self, other: "Flops") -> "Flops":
        """Both together: the micro-batches of a step."""
        inside = self.inside + other.inside
        return Flops(self.forward + other.forward, self.backward + other.backward, inside)


def count_flops(model: VLMConfig, batch: Batch, *, vocab_size: int, trainable: Collection[str]) -> Flops:
    """Count the operations of the forward and the backward pass of one micro-batch.

    Args:
        model: the whole model.
        batch: the micro-batch; only its shapes, its trained tokens and the places of its tiles matter. On a GPU this
            waits for it; count before the batch goes there.
        vocab_size: tokens of the tokenizer, image token included.
        trainable: parts (of ``megavlm.models.part.PARTS``) whose weights train. With none there is no backward pass.

    Raises:
        ValueError: ``trainable`` names no part of a model, the batch was made for another fusion, or the tokenizer has
            more tokens than the model's vocabulary.
    """
    _check(model, batch, trainable)
    walk = _Walk(trainable)
    if model.learns_from_pairs:
        _walk_pairs(walk, model, batch, vocab_size)
        return Flops(+walk.forward, +walk.backward, +walk.inside)
    features = _walk_features(walk, model, batch)
    # Embeddings are looked up: no product. A blank tile's features are added to them.
    joins_tokens = batch.tiles.shape[0] == 0 or bool((batch.tile_context == 0).any())
    hidden_states = walk.trains("language") or (features and joins_tokens)
    context = _context_needs(walk, model, batch, features)
    crossed, with_experts = model.cross_attention_layers, model.decoder.layers_with_experts
    for layer in range(model.decoder.num_layers):
        if layer in crossed and model.gated_feed_forward is not None:
            hidden_states = _walk_gated_block(walk, model, batch, hidden_states, context)
        hidden_states = _walk_self_attention(walk, model.decoder, layer, batch, hidden_states)
        if layer in crossed and model.gated_feed_forward is None:
            hidden_states = _walk_cross_attention(walk, model.decoder, batch, hidden_states, context)
        moe = model.decoder.moe if layer in with_experts else None
        hidden_states = _walk_feed_forward(walk, model.decoder, layer, moe, batch, hidden_states)
    divisor = model.decoder.make_vocab_size_divisible_by
    padded_vocab_size = -(-model_vocab_size(model.decoder, vocab_size) // divisor) * divisor
    num_trained = max(1, int(batch.loss_mask.count_nonzero()))  # as LanguageModel.token_losses
    walk.linear("language", num_trained, model.decoder.hidden_size, padded_vocab_size, hidden_states)
    return Flops(+walk.forward, +walk.backward, +walk.inside)


def _check(model: VLMConfig, batch: Batch, trainable: Collection[str]) -> None:
    unknown = [part for part in trainable if part not in PARTS]
    if unknown:
        raise ValueError(f"trainable={list(trainable)}: has no part {unknown[0]!r}. Choose from {', '.join(PARTS)}.")
    if model.fusion.tile_route.uses_context != (batch.context_length > 0):
        raise ValueError(
            f"batch.context_length={batch.context_length}: the model has {len(model.cross_attention_layers)} layers "
            "with cross-attention. Make batches by the model's tile_route."
        )


class _Walk:
    """Goes through the model as the data does and adds up.

    What it hands from product to product is a bool: whether the tensor's gradient is needed, which is whether a
    trained weight came before.
    """

    def __init__(self, trainable: Collection[str]) -> None:
        self.trainable = frozenset(trainable)
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.inside: Counter[str] = Counter()

    def trains(self, *parts: str) -> bool:
        """Whether any of the parts trains."""
        return not self.trainable.isdisjoint(parts)

    def linear(
        self,
        part: str,
        num_vectors: int,
        input_size: int,
        output_size: int,
        needs_input: bool,
        *,
        inside: str = "",
        weight_of: str = "",
    ) -> bool:
        """A weight matrix: one product forward, one for each gradient. Return whether the output needs a gradient.

        The weight trains with its part, or with another (``weight_of``) that is counted with this one.
        """
        product = 2 * num_vectors * input_size * output_size
        weight_trains = self.trains(weight_of or part)
        num_gradients = weight_trains + needs_input
        self.forward[part] += product
        self.backward[part] += product * num_gradients
        if inside:
            self.inside[inside] += product * (1 + num_gradients)
        return weight_trains or needs_input

    def lora(
        self, config: LanguageConfig, layer: int, widths: Mapping[str, tuple[int, int]], num_vectors: int, needs: bool
    ) -> bool:
        """LoRA of projections with these widths in and out. Return whether what it adds needs a gradient."""
        added = False
        for projection, (input_size, output_size) in widths.items():
            if config.lora is not None and config.lora.adapts(layer, projection):
                rank = config.lora.r
                inner = self.linear("language", num_vectors, input_size, rank, needs, weight_of="lora")
                added |= self.linear("language", num_vectors, rank, output_size, inner, weight_of="lora")
        return added

    def attention(self, part: str, num_scores: int, width: int, needs_query: bool, needs_key_value: bool) -> bool:
        """Scores and weighted values of all heads (``width`` channels together). Return as :meth:`linear`."""
        product = 2 * num_scores * width
        self.forward[part] += 2 * product
        needs_scores = needs_query or needs_key_value
        # gradients of the scores, the queries, the keys and the values
        self.backward[part] += product * (needs_scores + needs_query + 2 * needs_key_value)
        return needs_scores


class _ConnectorWalk:
    """The walk as a connector sees it (:class:`megavlm.models.connectors.Products`)."""

    def __init__(self, walk: _Walk) -> None:
        self._walk = walk

    @property
    def trains(self) -> bool:
        return self._walk.trains("connector")

    def linear(self, num_vectors: int, input_size: int, output_size: int, needs_input: bool) -> bool:
        return self._walk.linear("connector", num_vectors, input_size, output_size, needs_input)

    def attention(self, num_scores: int, width: int, needs_query: bool, needs_key_value: bool) -> bool:
        return self._walk.attention("connector", num_scores, width, needs_query, needs_key_value)


def _walk_pairs(walk: _Walk, model: VLMConfig, batch: Batch, vocab_size: int) -> None:
    assert isinstance(model.language, QFormerTextConfig)
    assert isinstance(model.connector, QFormerConfig)
    num_pairs, vision = batch.tokens.shape[0], model.vision
    features = [_walk_vision(walk, encoder, batch.tiles.shape[0]) for encoder in vision.encoders][-1]
    walk_pairs(
        walk,
        model.language,
        model.connector,
        num_pairs=num_pairs,
        caption_length=batch.tokens.shape[1] - model.tokens_per_tile,
        num_trained=max(1, int(batch.loss_mask.count_nonzero())),
        num_patches=vision.num_patches,
        input_size=vision.hidden_size,
        vocab_size=model_vocab_size(model.language, vocab_size),
        features=features,
    )


def _walk_features(walk: _Walk, model: VLMConfig, batch: Batch) -> bool:
    """Tiles through vision encoder and connector. A text-only batch sends a blank one through the parts that train."""
    num_tiles = batch.tiles.shape[0]
    if num_tiles == 0 and not walk.trains("vision", "connector"):
        return False
    features = False
    if num_tiles > 0 or walk.trains("vision"):
        features = [_walk_vision(walk, encoder, max(1, num_tiles)) for encoder in model.vision.encoders][-1]
    return _walk_connector(walk, model, max(1, num_tiles), features)


def _walk_vision(walk: _Walk, config: VisionTransformerConfig, num_tiles: int) -> bool:
    num_patches = (config.image_size // config.patch_size) ** 2
    # the class token goes through the layers even where its feature is dropped
    num_positions = num_patches + config.has_class_token
    width = config.hidden_size
    walk.linear("vision", num_tiles * num_patches, 3 * config.patch_size**2, width, needs_input=False)
    num_vectors, needs = num_tiles * num_positions, walk.trains("vision")
    for _ in range(config.num_layers_built):
        walk.linear("vision", num_vectors, width, 3 * width, needs)
        walk.attention("vision", num_tiles * num_positions**2, width, needs, needs)
        walk.linear("vision", num_vectors, width, width, needs)
        walk.linear("vision", num_vectors, width, config.num_ffn_inputs * config.ffn_hidden_size, needs)
        walk.linear("vision", num_vectors, config.ffn_hidden_size, width, needs)
    return needs


def _walk_connector(walk: _Walk, model: VLMConfig, num_tiles: int, features: bool) -> bool:
    config: AnyConnectorConfig = model.connector
    vision = model.vision
    shape = FeatureShape(num_tiles, vision.num_patches, vision.hidden_size, model.decoder.hidden_size)
    return config.count_products(_ConnectorWalk(walk), shape, features)


def _context_needs(walk: _Walk, model: VLMConfig, batch: Batch, features: bool) -> bool:
    """Whether keys and values come from a trained weight: the context's norm, features, embeddings of tags."""
    has_tags = model.fusion.tile_route.context_tags != "text"
    has_tiles = bool((batch.tile_context != 0).any())
    return walk.trains("cross_attention") or (has_tiles and (features or (has_tags and walk.trains("language"))))


def _walk_self_attention(walk: _Walk, config: LanguageConfig, layer: int, batch: Batch, hidden_states: bool) -> bool:
    num_rows, row_length = batch.tokens.shape
    num_vectors, width = num_rows * row_length, config.hidden_size
    query_width, key_value_width = _head_widths(config)
    needs = hidden_states or walk.trains("language")  # from the norm on
    key_width = key_value_width // 2
    inputs = {"q_proj": (width, query_width), "k_proj": (width, key_width), "v_proj": (width, key_width)}
    added = walk.lora(config, layer, inputs, num_vectors, needs)
    needs = walk.linear("language", num_vectors, width, query_width + key_value_width, needs) or added
    walk.attention("language", num_rows * row_length**2, query_width, needs, needs)
    added = walk.lora(config, layer, {"o_proj": (query_width, width)}, num_vectors, needs)
    return walk.linear("language", num_vectors, query_width, width, needs) or added


def _walk_cross_attention(
    walk: _Walk, config: LanguageConfig, batch: Batch, hidden_states: bool, context: bool
) -> bool:
    num_rows, row_length = batch.tokens.shape
    num_vectors, num_context_vectors = num_rows * row_length, num_rows * batch.context_length
    width = config.hidden_size
    query_width, key_value_width = _head_widths(config)
    normed = hidden_states or walk.trains("cross_attention")  # from the norm on
    query = walk.linear("cross_attention", num_vectors, width, query_width, normed)
    key_value = walk.linear("cross_attention", num_context_vectors, width, key_value_width, context)
    attended = walk.attention("cross_attention", num_vectors * batch.context_length, query_width, query, key_value)
    branch = walk.linear("cross_attention", num_vectors, query_width, width, attended)
    return hidden_states or branch


def _walk_gated_block(walk: _Walk, model: VLMConfig, batch: Batch, hidden_states: bool, context: bool) -> bool:
    """Cross-attention and feed-forward layer, before a decoder layer."""
    feed_forward, width = model.gated_feed_forward, model.decoder.hidden_size
    assert feed_forward is not None
    hidden_states = _walk_cross_attention(walk, model.decoder, batch, hidden_states, context)
    num_vectors, inner_size = batch.tokens.numel(), feed_forward.width(width)
    num_inputs = 2 if feed_forward.activation == "swiglu" else 1
    inner = hidden_states or walk.trains("cross_attention")  # from the norm on
    inner = walk.linear("cross_attention", num_vectors, width, num_inputs * inner_size, inner)
    return walk.linear("cross_attention", num_vectors, inner_size, width, inner) or hidden_states


def _walk_feed_forward(
    walk: _Walk, config: LanguageConfig, layer: int, moe: MoEConfig | None, batch: Batch, hidden_states: bool
) -> bool:
    """Feed-forward layer of a decoder layer; ``moe`` where it has experts."""
    num_vectors, width, inner_size, inside = batch.tokens.numel(), config.hidden_size, config.ffn_hidden_size, ""
    needs = hidden_states or walk.trains("language")
    if moe is not None:
        walk.linear("language", num_vectors, width, moe.num_moe_experts, needs, inside="router")
        num_vectors, inner_size, inside = _rows_of_experts(moe, num_vectors), expert_width(config), "experts"
    added = walk.lora(
        config, layer, {"gate_proj": (width, inner_size), "up_proj": (width, inner_size)}, num_vectors, needs
    )
    # gate and value of SwiGLU
    needs = walk.linear("language", num_vectors, width, 2 * inner_size, needs, inside=inside) or added
    added = walk.lora(config, layer, {"down_proj": (inner_size, width)}, num_vectors, needs)
    return walk.linear("language", num_vectors, inner_size, width, needs, inside=inside) or added


def _rows_of_experts(moe: MoEConfig, num_tokens: int) -> int:
    """Vectors that go through the experts of a layer, all experts together."""
    num_chosen = num_tokens * moe.moe_router_topk
    if moe.moe_expert_capacity_factor is None:
        return num_chosen
    # as megatron-core.transformer.moe.moe_utils.get_capacity
    capacity = math.ceil(num_chosen / moe.num_moe_experts * moe.moe_expert_capacity_factor)
    room = capacity * moe.num_moe_experts
    return room if moe.moe_pad_expert_input_to_capacity else min(num_chosen, room)


def _head_widths(config: LanguageConfig) -> tuple[int, int]:
    """Channels of all query heads, and of all keys and values together."""
    channels = config.kv_channels or config.hidden_size // config.num_attention_heads
    num_groups = config.num_query_groups or config.num_attention_heads
    return channels * config.num_attention_heads, 2 * channels * num_groups
