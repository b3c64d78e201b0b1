"""What the ``config.json`` of a decoder says."""

from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from megavlm.convert.recipe_of.values import Tree, refuse, unsupported, with_defaults
from megavlm.runtime.log import LOGGER

DECODER_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
"""Their name -> ours, of decoders."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's stretching of rotary frequencies is fixed to."""

DECODERS: dict[str, type[transformers.PreTrainedConfig]] = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "MixtralForCausalLM": transformers.MixtralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
}
DECODER_OF_TYPE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}


def decoder_tree(config: Mapping[str, Any], architecture: str, where: str = "config.json") -> Tree:
    """Return what a decoder's configuration says.

    Args:
        config: of one of :data:`DECODERS`.
        architecture: which of them.
        where: the configuration's name in errors.

    Raises:
        ValueError: a value is one that MegaVLM has no counterpart for.
    """
    full = with_defaults(DECODERS[architecture], config, where)
    allowed: dict[str, Sequence[Any]] = {"hidden_act": ["silu"]}
    if architecture == "LlamaForCausalLM":
        allowed |= {"attention_bias": [False], "mlp_bias": [False]}
    if architecture == "Qwen2ForCausalLM":
        allowed |= {"use_sliding_window": [False]}
    if architecture == "MixtralForCausalLM":
        allowed["router_jitter_noise"] = [0.0]
    problems = unsupported(full, allowed)
    if architecture == "MixtralForCausalLM":
        problems += _unsupported_experts(full)
    window, positions = full.get("sliding_window"), full["max_position_embeddings"]
    if architecture in ("MistralForCausalLM", "MixtralForCausalLM") and window is not None and window < positions:
        problems.append(f"sliding_window={window} (below max_position_embeddings={positions}; supported: null)")
    rope = full["rope_parameters"]
    problems += _unsupported_rope(rope)
    refuse(problems, where)
    if rope["rope_type"] == "dynamic":
        LOGGER.info(
            "%s: rope_type=dynamic only stretches rows of more than max_position_embeddings=%d tokens; MegaVLM never "
            "does: keep to shorter rows",
            where,
            positions,
        )
    tree = {ours: full[theirs] for theirs, ours in DECODER_FIELDS.items()}
    return tree | {
        "kv_channels": full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"],
        "add_qkv_bias": architecture == "Qwen2ForCausalLM",
        "rotary_base": int(rope["rope_theta"]),
        "rope_scaling_factor": float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        "moe": _experts(full) if architecture == "MixtralForCausalLM" else None,
    }


def _experts(full: Mapping[str, Any]) -> Tree:
    """What a Mixtral says of ``model.language.moe``.

    Its load-balancing loss sums the shares of the choices to k, ours to 1, so the coefficient is multiplied by k. It
    also pools the tokens of all layers before it multiplies shares by scores, where ours is a sum over layers: there is
    no factor for that, and a run that goes on may want the coefficient divided by the number of layers.
    """
    topk = full["num_experts_per_tok"]
    return {
        "num_moe_experts": full["num_local_experts"],
        "moe_router_topk": topk,
        "moe_router_pre_softmax": False,
        "moe_aux_loss_coeff": full["router_aux_loss_coef"] * topk,
    }


def _unsupported_experts(full: Mapping[str, Any]) -> list[str]:
    experts, topk = full["num_local_experts"], full["num_experts_per_tok"]
    if 2 <= topk <= experts:
        return []
    return [f"num_experts_per_tok={topk} (of num_local_experts={experts}; supported: 2 to all of them)"]


def _unsupported_rope(rope: Mapping[str, Any]) -> list[str]:
    problems = unsupported(rope, {"rope_type": ["default", "llama3", "dynamic"], "partial_rotary_factor": [1.0]})
    if rope["rope_type"] == "llama3":
        problems += unsupported(rope, {name: [value] for name, value in LLAMA3_ROPE.items()})
    if rope["rope_theta"] != int(rope["rope_theta"]):
        problems.append(f"rope_theta={rope['rope_theta']} (supported: whole numbers)")
    return problems
