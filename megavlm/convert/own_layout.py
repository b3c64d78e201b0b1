"""MegaVLM's own layout, for whole models that no class of ``transformers`` can carry: NVLM-X, NVLM-H, odd connectors.

A folder of it brings its code along (``published_code/``) and loads by ``AutoModelForImageTextToText`` with
``trust_remote_code=True``. Names: ``vision.*`` as the stock tower has them, ``language.*`` as LlamaForCausalLM,
``connector.*`` and ``cross_attention.*`` as below. docs/WEIGHTS.md has every tensor's shape and meaning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.convert import clip, dinov2, internvit, llama, siglip
from megavlm.convert.rules import Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.config import VLMConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.dinov2 import Dinov2Config

ARCHITECTURE = "MegaVLMForConditionalGeneration"
MODEL_TYPE = "megavlm"
CODE_FOLDER = Path(__file__).with_name("published_code")
MODEL_CODE = ("configuration_megavlm.py", "layers_megavlm.py", "modeling_megavlm.py")
"""Files that every folder of the layout holds a copy of."""
AUTO_MAP = {
    "AutoConfig": "configuration_megavlm.MegaVLMConfig",
    "AutoModelForImageTextToText": f"modeling_megavlm.{ARCHITECTURE}",
    "AutoModelForCausalLM": f"modeling_megavlm.{ARCHITECTURE}",
}
"""Auto class of ``transformers`` -> where its model is."""

VISION_RULES: dict[str, Callable[[Any], tuple[Rule, ...]]] = {
    "internvit": internvit.encoder_rules,
    "clip": clip.encoder_rules,
    "dinov2": dinov2.encoder_rules,
    "siglip": siglip.encoder_rules,
}
"""Kind of vision encoder -> the table of its stock class, without prefixes."""

CONNECTOR_RULES = (
    Rule("layernorm.{leaf}", ("norm.{leaf}",)),
    Rule("linear_fc1.{leaf}", ("linear_1.{leaf}",)),
    Rule("linear_fc2.{leaf}", ("linear_2.{leaf}",)),
)

TENSORS: dict[str, tuple[str, str]] = {
    "vision.*": ("as in the stock class", "the vision tower of `vision_config`, of the layers that are used"),
    "connector.norm.{weight,bias}": (
        "[W]",
        "LayerNorm of the (shuffled) patch features; W = V, or 4 V with pixel shuffle",
    ),
    "connector.linear_1.weight": ("[F, W]", "first layer; F = H if it is the only one"),
    "connector.linear_1.bias": ("[F]", "its bias, with `connector.bias`"),
    "connector.linear_2.weight": ("[H, F]", "second layer, behind a GELU, with `connector.num_layers: 2`"),
    "connector.linear_2.bias": ("[H]", "its bias, with `connector.bias`"),
    "cross_attention.context_norm.weight": (
        "[H]",
        "RMSNorm of what cross-attention reads: projected features and tags",
    ),
    "cross_attention.layers.{layer}.norm.weight": ("[H]", "RMSNorm of the tokens before their queries"),
    "cross_attention.layers.{layer}.q_proj.weight": ("[Q * D, H]", "queries, of the tokens; no positions"),
    "cross_attention.layers.{layer}.k_proj.weight": ("[G * D, H]", "keys, of the context; no positions"),
    "cross_attention.layers.{layer}.v_proj.weight": ("[G * D, H]", "values, of the context"),
    "cross_attention.layers.{layer}.o_proj.weight": ("[H, Q * D]", "output projection"),
    "cross_attention.layers.{layer}.gate": ("[1]", "its tanh scales what is added to the residual stream"),
    "language.model.embed_tokens.weight": ("[vocabulary, H]", "word embedding; tags in the context use it too"),
    "language.model.layers.{layer}.*": ("as in LlamaForCausalLM", "decoder layer; Qwen2's with biases on q, k, v"),
    "language.model.norm.weight": ("[H]", "RMSNorm after the last layer"),
    "language.lm_head.weight": ("[vocabulary, H]", "output layer; left out where it is the word embedding"),
}
"""Name -> shape and meaning. V is the width of the vision features, H that of the language model, F the connector's
inner width; Q heads in G groups of D channels; ``{layer}`` counts decoder layers from 0."""


@dataclass(frozen=True)
class GroupedKV:
    """Keys and values as two tensors; ours is one, in which a group's key and value stand side by side."""

    num_groups: int

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Interleave two of ``[groups * D, ...]``.

        Raises:
            ValueError: they are not of that many groups.
        """
        rows = [tensor.shape[0] for tensor in theirs]
        if rows[0] != rows[1] or rows[0] == 0 or rows[0] % self.num_groups:
            raise ValueError(f"have {rows} rows, which are not keys and values of {self.num_groups} groups")
        groups = [tensor.unflatten(0, (self.num_groups, 1, -1)) for tensor in theirs]
        return torch.cat(groups, dim=1).flatten(0, 2)

    def split(self, ours: Tensor) -> list[Tensor]:
        """Return keys, values."""
        groups = ours.unflatten(0, (self.num_groups, 2, -1))
        return [part.flatten(0, 1).contiguous() for part in groups.unbind(1)]


def cross_attention_rules(config: LanguageConfig) -> tuple[Rule, ...]:
    """Return the table of cross-attention; theirs is numbered by the decoder layer that it stands in."""
    ours, theirs = "language.decoder.layers.{layer}.", "cross_attention.layers.{layer}."
    groups = config.num_query_groups or config.num_attention_heads
    return (
        Rule("context_layernorm.weight", ("cross_attention.context_norm.weight",)),
        Rule(ours + "pre_cross_attn_layernorm.weight", (theirs + "norm.weight",)),
        Rule(ours + "cross_attention.linear_q.weight", (theirs + "q_proj.weight",)),
        Rule(
            ours + "cross_attention.linear_kv.weight",
            (theirs + "k_proj.weight", theirs + "v_proj.weight"),
            GroupedKV(groups),
        ),
        Rule(ours + "cross_attention.linear_proj.weight", (theirs + "o_proj.weight",)),
        Rule(ours + "cross_attn_bda.gate", (theirs + "gate",)),
    )


def weight_map(config: VLMConfig) -> WeightMap:
    """Return the map between a whole model of ours and a folder of the layout.

    Raises:
        ValueError: the layout has no tower for the model's vision encoder.
    """
    if isinstance(config.vision, Dinov2Config):
        problems = dinov2.problems(config.vision.model_copy(update={"post_layernorm": True}))
        if problems:
            raise ValueError(f"{'; '.join(problems)}: the layout of {ARCHITECTURE} has no tower for it. Change it.")
    rules = VISION_RULES.get(config.vision.kind)
    if rules is None:
        raise ValueError(
            f"model.vision.kind={config.vision.kind!r}: the layout of {ARCHITECTURE} has {', '.join(VISION_RULES)}. "
            "Choose one of them; --part language writes the language model alone."
        )
    return WeightMap(
        rules=under(rules(config.vision), ours="vision.", theirs="vision.")
        + under(CONNECTOR_RULES, ours="connector.", theirs="connector.")
        + (cross_attention_rules(config.decoder) if config.cross_attention_layers else ())
        + under(llama.decoder_rules(config.decoder), ours="language.", theirs="language."),
        tied=(("language.lm_head.weight", "language.model.embed_tokens.weight"),),
    )


def foreign_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Say what of a folder's code is not ours; the code may be run only if there is nothing.

    Args:
        folder: of the layout.
        config: its ``config.json``.
    """
    found = [f"{name} is not MegaVLM's" for name in MODEL_CODE if not _is_ours(folder / name)]
    if config.get("auto_map") != AUTO_MAP:
        found.append(f"config.json: auto_map={config.get('auto_map')} names other code than MegaVLM's")
    for part in ("text_config", "vision_config"):
        tree = config.get(part)
        if not isinstance(tree, Mapping) or "auto_map" in tree:
            found.append(f"config.json: {part} names code of its own, or is missing")
    return found


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == (CODE_FOLDER / path.name).read_bytes()
