"""Weights of CLIP's vision tower, as in ``transformers``' CLIPModel and CLIPVisionModel."""

from megavlm.convert.rules import GroupedQKV, Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.vision.clip import ClipConfig

_PREFIX = "vision_model."
UNUSED = ("post_layernorm.*", "embeddings.position_ids")
"""Of the tower: the norm of the image embedding, behind the patch features, and 0, 1, 2, ... in old files."""
_NOT_OF_THE_TOWER = (
    "text_model.*",
    "text_projection.weight",
    "visual_projection.weight",
    "logit_scale",
)


def encoder_rules(config: ClipConfig) -> tuple[Rule, ...]:
    """Return the table of the vision tower, without prefixes."""
    qkv = GroupedQKV(config.num_attention_heads, config.num_attention_heads)
    ours = theirs = "encoder.layers.{layer}."
    return (
        Rule("embedding.weight", ("embeddings.patch_embedding.weight",)),
        Rule("embedding.class_token", ("embeddings.class_embedding",)),
        Rule("embedding.positions", ("embeddings.position_embedding.weight",)),
        Rule("pre_layernorm.{leaf}", ("pre_layrnorm.{leaf}",)),  # misspelt in every published checkpoint
        Rule(ours + "input_layernorm.{leaf}", (theirs + "layer_norm1.{leaf}",)),
        Rule(
            ours + "self_attention.linear_qkv.{leaf}",
            tuple(theirs + f"self_attn.{part}_proj.{{leaf}}" for part in "qkv"),
            qkv,
        ),
        Rule(ours + "self_attention.linear_proj.{leaf}", (theirs + "self_attn.out_proj.{leaf}",)),
        Rule(ours + "pre_mlp_layernorm.{leaf}", (theirs + "layer_norm2.{leaf}",)),
        Rule(ours + "mlp.linear_fc1.{leaf}", (theirs + "mlp.fc1.{leaf}",)),
        Rule(ours + "mlp.linear_fc2.{leaf}", (theirs + "mlp.fc2.{leaf}",)),
        Rule("post_layernorm.{leaf}", ("post_layernorm.{leaf}",)),
    )


def unused(config: ClipConfig) -> tuple[str, ...]:
    """Return patterns of the tower's tensors that are not built, without prefixes."""
    not_built = range(config.num_layers_built, config.num_layers)
    return UNUSED + tuple(f"encoder.layers.{layer}.*" for layer in not_built)


def idle_norms(config: ClipConfig) -> tuple[tuple[str, int], ...]:
    """Return the norm that CLIPVisionModel has and ours has not."""
    return (("vision.post_layernorm", config.hidden_size),)


def weight_map(config: ClipConfig) -> WeightMap:
    """Return the map between ``vision.*`` and a CLIP checkpoint (both towers, or the vision tower alone)."""
    return WeightMap(
        rules=under(encoder_rules(config), ours="vision.", theirs=_PREFIX),
        unused=_NOT_OF_THE_TOWER + tuple(_PREFIX + pattern for pattern in unused(config)),
        idle_norms=idle_norms(config),
        spellings=(("", _PREFIX),),  # CLIPVisionModel alone drops the prefix
    )
