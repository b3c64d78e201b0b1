"""Weights of ``transformers``' MixtralForCausalLM (Mixtral 8x7B and 8x22B).

Attention and norms are Llama's; every feed-forward layer is a mixture of experts. Published folders hold each expert's
three matrices apart (``block_sparse_moe.experts.3.w1.weight``: gate, ``w3``: up, ``w2``: down). ``transformers`` from 5
on has the experts of a layer in two tensors in memory (``mlp.experts.gate_up_proj``), which are ours; folders that hold
those are read too, and never written.
"""

from megavlm.convert import llama
from megavlm.convert.rules import Experts, Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import MoEConfig

_DENSE = "decoder.layers.{layer}.mlp."


def weight_map(config: LanguageConfig) -> WeightMap:
    """Return the map between ``language.*`` and a MixtralForCausalLM checkpoint.

    Raises:
        ValueError: the recipe's model is none that MixtralForCausalLM can be.
    """
    problems = mixtral_problems(config)
    if problems:
        raise ValueError(f"model.language: is no Mixtral: {'; '.join(problems)}. Change the recipe.")
    assert config.moe is not None
    shared = tuple(rule for rule in llama.decoder_rules(config) if not rule.ours.startswith(_DENSE))
    return WeightMap(
        rules=under(shared + _expert_rules(config.moe), ours="language.", theirs=""),
        unused=llama.UNUSED,
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
    )


def mixtral_problems(config: LanguageConfig) -> list[str]:
    """Name each setting of a language model that MixtralForCausalLM has no place for."""
    moe = config.moe
    if moe is None:
        return ["model.language.moe=None (only with experts)"]
    num_dense = config.num_layers - len(config.layers_with_experts)
    problems = []
    if num_dense:
        freq = moe.moe_layer_freq
        problems.append(f"model.language.moe.moe_layer_freq={freq} ({num_dense} dense layers; only experts in each)")
    wanted = {
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": None,
        "moe_expert_capacity_factor": None,
    }
    for name, value in wanted.items():
        if getattr(moe, name) != value:
            problems.append(f"model.language.moe.{name}={getattr(moe, name)} (only {value})")
    if config.add_qkv_bias:
        problems.append("model.language.add_qkv_bias=True (only False)")
    return problems


def _expert_rules(moe: MoEConfig) -> tuple[Rule, ...]:
    """Rows of the router and the experts: as published, then as in memory."""
    ours, published, fused = _DENSE, "model.layers.{layer}.block_sparse_moe.", "model.layers.{layer}.mlp."
    experts = [f"{published}experts.{number}." for number in range(moe.num_moe_experts)]
    fc1, fc2 = f"{ours}experts.experts.linear_fc1.weight", f"{ours}experts.experts.linear_fc2.weight"
    return (
        Rule(f"{ours}router.weight", (f"{published}gate.weight",)),
        Rule(fc1, tuple(f"{expert}{name}.weight" for expert in experts for name in ("w1", "w3")), Experts(2)),
        Rule(fc2, tuple(f"{expert}w2.weight" for expert in experts), Experts(1)),
        Rule(f"{ours}router.weight", (f"{fused}gate.weight",)),
        Rule(fc1, (f"{fused}experts.gate_up_proj",)),
        Rule(fc2, (f"{fused}experts.down_proj",)),
    )
