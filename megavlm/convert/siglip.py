"""Weights of SigLIP's vision tower, as in ``transformers``' SiglipModel and SiglipVisionModel."""

from megavlm.convert.rules import GroupedQKV, Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.vision.siglip import SiglipConfig

_PREFIX = "vision_model."
_NOT_OF_THE_TOWER = ("text_model.*", "logit_scale", "logit_bias")


def encoder_rules(config: SiglipConfig) -> tuple[Rule, ...]:
    """Return the table of the vision tower, its pooling head included, without prefixes."""
    qkv = GroupedQKV(config.num_attention_heads, config.num_attention_heads)
    ours = theirs = "encoder.layers.{layer}."
    head = ("attention.in_proj_{leaf}", "attention.out_proj.{leaf}", "layernorm.{leaf}", "mlp.fc1.{leaf}")
    return (
        Rule("embedding.{leaf}", ("embeddings.patch_embedding.{leaf}",)),
        Rule("embedding.positions", ("embeddings.position_embedding.weight",)),
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
        *(Rule(f"head.{name}", (f"head.{name}",)) for name in ("probe", *head, "mlp.fc2.{leaf}")),
    )


def unused(config: SiglipConfig) -> tuple[str, ...]:
    """Return patterns of the tower's tensors that are not built, without prefixes."""
    not_normed = () if config.post_layernorm else ("post_layernorm.*",)
    not_built = range(config.num_layers_built, config.num_layers)
    layers = tuple(f"encoder.layers.{layer}.*" for layer in not_built)
    return ("head.*", "embeddings.position_ids", *not_normed, *layers)


def idle_norms(config: SiglipConfig) -> tuple[tuple[str, int], ...]:
    """Return the norm that SiglipVisionModel has and ours has not."""
    return () if config.post_layernorm else (("vision.post_layernorm", config.hidden_size),)


def weight_map(config: SiglipConfig) -> WeightMap:
    """Return the map between ``vision.*`` and a SigLIP checkpoint (both towers, or the vision tower alone)."""
    return WeightMap(
        rules=under(encoder_rules(config), ours="vision.", theirs=_PREFIX),
        unused=_NOT_OF_THE_TOWER + tuple(_PREFIX + pattern for pattern in unused(config)),
        idle_norms=idle_norms(config),
        spellings=(("", _PREFIX),),  # SiglipVisionModel alone may drop the prefix
    )
