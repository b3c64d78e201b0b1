"""Weights of InternViT, in both of its namings: ``transformers``' InternVLVisionModel, and the original release."""

from megavlm.convert.rules import GroupedQKV, LeadingOnes, PackedQKV, Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.vision.internvit import InternViTConfig


def encoder_rules(config: InternViTConfig) -> tuple[Rule, ...]:
    """Return the table of InternVLVisionModel, without prefixes."""
    qkv = GroupedQKV(config.num_attention_heads, config.num_attention_heads)
    ours, theirs = "encoder.layers.{layer}.", "encoder.layer.{layer}."
    return (
        Rule("embedding.{leaf}", ("embeddings.patch_embeddings.projection.{leaf}",)),
        Rule("embedding.class_token", ("embeddings.cls_token",), LeadingOnes(2)),
        Rule("embedding.positions", ("embeddings.position_embeddings",), LeadingOnes(1)),
        Rule(ours + "input_layernorm.{leaf}", (theirs + "layernorm_before.{leaf}",)),
        Rule(
            ours + "self_attention.linear_qkv.{leaf}",
            tuple(theirs + f"attention.{part}_proj.{{leaf}}" for part in "qkv"),
            qkv,
        ),
        Rule(ours + "self_attention.q_layernorm.weight", (theirs + "attention.q_norm.weight",)),
        Rule(ours + "self_attention.k_layernorm.weight", (theirs + "attention.k_norm.weight",)),
        Rule(ours + "self_attention.linear_proj.{leaf}", (theirs + "attention.projection_layer.{leaf}",)),
        Rule(ours + "self_attn_bda.weight", (theirs + "lambda_1",)),
        Rule(ours + "pre_mlp_layernorm.{leaf}", (theirs + "layernorm_after.{leaf}",)),
        Rule(ours + "mlp.linear_fc1.{leaf}", (theirs + "mlp.fc1.{leaf}",)),
        Rule(ours + "mlp.linear_fc2.{leaf}", (theirs + "mlp.fc2.{leaf}",)),
        Rule(ours + "mlp_bda.weight", (theirs + "lambda_2",)),
    )


def original_encoder_rules(config: InternViTConfig) -> tuple[Rule, ...]:
    """Return the table of the original release (OpenGVLab's InternViT-*, InternVL 1 to 3, NVLM-D), without prefixes."""
    ours, theirs = "encoder.layers.{layer}.", "encoder.layers.{layer}."
    return (
        Rule("embedding.{leaf}", ("embeddings.patch_embedding.{leaf}",)),
        Rule("embedding.class_token", ("embeddings.class_embedding",), LeadingOnes(2)),
        Rule("embedding.positions", ("embeddings.position_embedding",), LeadingOnes(1)),
        Rule(ours + "input_layernorm.{leaf}", (theirs + "norm1.{leaf}",)),
        Rule(
            ours + "self_attention.linear_qkv.{leaf}",
            (theirs + "attn.qkv.{leaf}",),
            PackedQKV(config.num_attention_heads),
        ),
        Rule(ours + "self_attention.q_layernorm.weight", (theirs + "attn.q_norm.weight",)),
        Rule(ours + "self_attention.k_layernorm.weight", (theirs + "attn.k_norm.weight",)),
        Rule(ours + "self_attention.linear_proj.{leaf}", (theirs + "attn.proj.{leaf}",)),
        Rule(ours + "self_attn_bda.weight", (theirs + "ls1",)),
        Rule(ours + "pre_mlp_layernorm.{leaf}", (theirs + "norm2.{leaf}",)),
        Rule(ours + "mlp.linear_fc1.{leaf}", (theirs + "mlp.fc1.{leaf}",)),
        Rule(ours + "mlp.linear_fc2.{leaf}", (theirs + "mlp.fc2.{leaf}",)),
        Rule(ours + "mlp_bda.weight", (theirs + "ls2",)),
    )


def unused(config: InternViTConfig, layers: str) -> tuple[str, ...]:
    """Return patterns of the layers after ``select_layer``, which are not built. ``layers``: their prefix."""
    return tuple(f"{layers}{layer}.*" for layer in range(config.num_layers_built, config.num_layers))


def weight_map(config: InternViTConfig) -> WeightMap:
    """Return the map between ``vision.*`` and an InternVLVisionModel checkpoint."""
    return WeightMap(
        rules=under(encoder_rules(config), ours="vision.", theirs=""), unused=unused(config, "encoder.layer.")
    )


def original_weight_map(config: InternViTConfig) -> WeightMap:
    """Return the map between ``vision.*`` and an original InternViT checkpoint."""
    return WeightMap(
        rules=under(original_encoder_rules(config), ours="vision.", theirs=""), unused=unused(config, "encoder.layers.")
    )
