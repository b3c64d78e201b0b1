"""Weights of ``transformers``' LlamaForCausalLM (Llama 1 to 3, Mistral, Yi, SmolLM2 and others of that layout)."""

from megavlm.convert.rules import GatedMLP, GroupedQKV, Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.language import LanguageConfig

UNUSED = ("*.rotary_emb.inv_freq",)
"""Old checkpoints repeat the rotary frequencies, which are computed."""


def decoder_rules(config: LanguageConfig) -> tuple[Rule, ...]:
    """Return the table of a decoder, without prefixes. Biases are moved where there are any."""
    qkv = GroupedQKV(config.num_attention_heads, config.num_query_groups or config.num_attention_heads)
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    return (
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
        Rule(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",)),
        Rule(
            ours + "self_attention.linear_qkv.{leaf}",
            tuple(theirs + f"self_attn.{part}_proj.{{leaf}}" for part in "qkv"),
            qkv,
        ),
        Rule(ours + "self_attention.linear_proj.{leaf}", (theirs + "self_attn.o_proj.{leaf}",)),
        Rule(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",)),
        Rule(
            ours + "mlp.linear_fc1.{leaf}",
            (theirs + "mlp.gate_proj.{leaf}", theirs + "mlp.up_proj.{leaf}"),
            GatedMLP(),
        ),
        Rule(ours + "mlp.linear_fc2.{leaf}", (theirs + "mlp.down_proj.{leaf}",)),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("output_layer.weight", ("lm_head.weight",)),
    )


def weight_map(config: LanguageConfig) -> WeightMap:
    """Return the map between ``language.*`` and a LlamaForCausalLM checkpoint."""
    return WeightMap(
        rules=under(decoder_rules(config), ours="language.", theirs=""),
        unused=UNUSED,
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
    )
