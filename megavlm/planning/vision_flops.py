"""Operations of the vision encoders, product by product as ``models/vision/transformer.py`` computes them."""

from megavlm.models.connectors import Products
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vision.dual import DualConfig
from megavlm.models.vision.transformer import VisionTransformerConfig


def count_vision(vision: Products, config: AnyVisionConfig, num_tiles: int) -> bool:
    """Tell the products of all encoders.

    Args:
        vision: takes them.
        config: of the encoder, or of several.
        num_tiles: tiles that it sees.

    Returns:
        Whether the gradient of the features is needed.
    """
    if not isinstance(config, DualConfig):
        return _count_encoder(vision, config, num_tiles)
    features = False
    for number, encoder in enumerate(config.encoders):
        features |= _count_encoder(vision.within(f"encoders.{number}"), encoder, num_tiles)
    return features


def _count_encoder(encoder: Products, config: VisionTransformerConfig, num_tiles: int) -> bool:
    traits, width = config.traits, config.hidden_size
    num_patches = (config.image_size // config.patch_size) ** 2
    embedding = encoder.within("embedding")
    states = embedding.matrix(["weight"], num_tiles * num_patches, 3 * config.patch_size**2, width, False)
    learned = [("bias", traits.patch_bias), ("class_token", config.has_class_token), ("positions", True)]
    states |= embedding.trains(*(name for name, is_there in learned if is_there))
    if traits.pre_layernorm:
        states = encoder.norm("pre_layernorm", states)
    for number in range(config.num_layers_built):
        states = _count_layer(encoder.within(f"encoder.layers.{number}"), config, num_tiles, num_patches, states)
    return encoder.norm("post_layernorm", states) if traits.post_layernorm else states


def _count_layer(
    layer: Products, config: VisionTransformerConfig, num_tiles: int, num_patches: int, states: bool
) -> bool:
    traits, width, inner_size = config.traits, config.hidden_size, config.ffn_hidden_size
    # the class token goes through the layers even where its feature is dropped
    num_positions = num_patches + config.has_class_token
    num_vectors = num_tiles * num_positions
    attention, mlp = layer.within("self_attention"), layer.within("mlp")
    normed = layer.norm("input_layernorm", states, bias=traits.norm_bias)
    query = key = value = attention.linear("linear_qkv", num_vectors, width, 3 * width, normed, bias=traits.qkv_bias)
    if traits.qk_layernorm:
        query, key = (attention.norm(f"{name}_layernorm", value, bias=False) for name in ("q", "k"))
    attended = attention.attention(num_vectors * num_positions, width, query=query, key=key, value=value)
    states |= attention.linear("linear_proj", num_vectors, width, width, attended)
    states |= traits.layer_scale and layer.trains("self_attn_bda.weight")
    normed = layer.norm("pre_mlp_layernorm", states, bias=traits.norm_bias)
    inner = mlp.linear("linear_fc1", num_vectors, width, config.num_ffn_inputs * inner_size, normed)
    states |= mlp.linear("linear_fc2", num_vectors, inner_size, width, inner)
    return states or (traits.layer_scale and layer.trains("mlp_bda.weight"))
