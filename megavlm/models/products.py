"""The sides of a model's matrix products on one rank: what kernels with rules about shapes ask for.

Embedding and output layer are left out: no kernel with such rules computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.models.config import VLMConfig
from megavlm.models.connectors import FeatureShape, Products
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.transformer import VisionTransformerConfig


@dataclass(frozen=True)
class Side:
    """One side of products: a width of their weights, or the number of vectors that one tile brings."""

    part: str
    """``vision``, ``connector``, ``language``, ``cross_attention`` or ``experts``."""
    name: str
    """What it is, by recipe keys."""
    size: int
    """On one tensor-parallel rank."""


def product_sides(model: VLMConfig, tensor_model_parallel_size: int) -> list[Side]:
    """List the sides of the linear layers inside encoder, connector and decoder.

    The vectors of rows are not among them, because rows can be padded; a tile's cannot.

    Args:
        model: the whole model.
        tensor_model_parallel_size: ranks that share a layer (experts too).
    """
    tp = tensor_model_parallel_size
    sides = [side for encoder in model.vision.encoders for side in _encoder_sides(encoder, tp)]
    sides += _connector_sides(model, tp) + _decoder_sides(model.decoder, tp)
    if model.cross_attention_layers:
        sides += [Side("cross_attention", side.name, side.size) for side in _attention_sides(model.decoder, tp)]
    if (feed_forward := model.gated_feed_forward) is not None:
        inner = feed_forward.width(model.decoder.hidden_size) // tp
        sides.append(Side("cross_attention", "model.fusion.feed_forward.ffn_hidden_size", inner))
    return sides


def _encoder_sides(config: VisionTransformerConfig, tp: int) -> list[Side]:
    heads = -(-config.num_attention_heads // tp)  # dummy heads fill up
    # the class token goes through the layers even where its feature is dropped
    positions = (config.image_size // config.patch_size) ** 2 + config.has_class_token
    return [
        Side("vision", "model.vision.hidden_size", config.hidden_size),
        Side("vision", "width of the heads of model.vision", heads * config.hidden_size // config.num_attention_heads),
        Side("vision", "model.vision.ffn_hidden_size", config.ffn_hidden_size // tp),
        Side("vision", "vectors of a tile in model.vision", positions),
    ]


class _Collector(Products):
    """Takes down products with weight matrices, whatever trains."""

    def __init__(self) -> None:
        self.products: list[tuple[int, int, int]] = []

    def within(self, module: str) -> "_Collector":
        return self

    def trains(self, *parameters: str) -> bool:
        return False

    def matrix(
        self, parameters: Sequence[str], num_vectors: int, input_size: int, output_size: int, needs_input: bool
    ) -> bool:
        self.products.append((num_vectors, input_size, output_size))
        return False

    def attention(self, num_scores: int, width: int, *, query: bool, key: bool, value: bool) -> bool:
        return False


def _connector_sides(model: VLMConfig, tp: int) -> list[Side]:
    """Of each product both widths as if it were the split one: which is, only the layer knows."""
    vision, collector = model.vision, _Collector()
    shape = FeatureShape(1, vision.num_patches, vision.hidden_size, model.decoder.hidden_size)
    model.connector.count_products(collector, shape, False)
    sides = []
    for num_vectors, *widths in collector.products:
        sides.append(Side("connector", "vectors of a tile in model.connector", num_vectors))
        sides += [
            Side("connector", "a width of model.connector", width // tp if width % tp == 0 else width)
            for width in widths
        ]
    return list(dict.fromkeys(sides))


def _attention_sides(config: LanguageConfig, tp: int) -> list[Side]:
    return [
        Side("language", "model.language.hidden_size", config.hidden_size),
        Side("language", "width of the queries of model.language", config.query_width // tp),
        Side("language", "width of the keys and values of model.language", 2 * config.key_width // tp),
    ]


def _decoder_sides(config: LanguageConfig, tp: int) -> list[Side]:
    sides = _attention_sides(config, tp)
    if len(config.layers_with_experts) < config.num_layers:
        sides.append(Side("language", "model.language.ffn_hidden_size", config.ffn_hidden_size // tp))
    if config.moe is not None:
        inner = config.moe.moe_ffn_hidden_size or config.ffn_hidden_size
        sides += [
            Side("experts", "model.language.hidden_size", config.hidden_size),
            Side("experts", "width of an expert of model.language.moe", inner // tp),
        ]
    return sides
