"""Weights of NVLM-D-72B as released: the original InternVL's names, and a vision encoder with dummy heads.

The release has 32 heads where InternViT-6B has 25, so that 8 ranks can share them. The dummies stand last in each of
queries, keys and values and add nothing to the output; :mod:`megavlm.models.vision.transformer` adds its own where a
layout needs some, so these are left out.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.convert import internvl
from megavlm.convert.rules import Layout, PackedQKV, Rule
from megavlm.convert.weight_map import WeightMap
from megavlm.models.config import VLMConfig
from megavlm.models.vision.dual import DualConfig

NUM_DUMMY_HEADS = 7


@dataclass(frozen=True)
class WithoutDummyHeads:
    """One dimension of theirs is ``sections`` times all heads, ours only the real ones; ``layout`` does the rest."""

    width: int
    """Channels of the real heads."""
    num_heads: int
    """Real heads."""
    dim: int
    layout: Layout
    sections: int = 1

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Cut the dummies off.

        Raises:
            ValueError: the dimension is not that of all heads.
        """
        (tensor,) = theirs
        channels = self.width // self.num_heads
        padded = channels * (self.num_heads + NUM_DUMMY_HEADS)
        if tensor.shape[self.dim] != self.sections * padded:
            raise ValueError(
                f"has shape {tuple(tensor.shape)}, and dimension {self.dim} of {self.num_heads} heads with "
                f"{NUM_DUMMY_HEADS} dummies has {self.sections * padded}"
            )
        real = [section.narrow(self.dim, 0, self.width) for section in tensor.chunk(self.sections, self.dim)]
        return self.layout.merge([torch.cat(real, self.dim)])

    def split(self, ours: Tensor) -> list[Tensor]:
        """Put dummies of zeros behind each section."""
        (tensor,) = self.layout.split(ours)
        shape = list(tensor.shape)
        shape[self.dim] = self.width // self.num_heads * NUM_DUMMY_HEADS
        sections = tensor.chunk(self.sections, self.dim)
        padded = [part for section in sections for part in (section, tensor.new_zeros(shape))]
        return [torch.cat(padded, self.dim)]


def weight_map(config: VLMConfig) -> WeightMap:
    """Return the map of NVLM-D-72B's files.

    Raises:
        ValueError: the recipe's vision encoder is not InternViT.
    """
    original = internvl.original_weight_map(config)
    assert not isinstance(config.vision, DualConfig), "the map of its original takes InternViT alone"
    heads = config.vision.num_attention_heads
    dimensions = {"self_attention.linear_proj.weight": 1, "q_layernorm.weight": 0, "k_layernorm.weight": 0}
    rules = []
    for rule in original.rules:
        if isinstance(rule.layout, PackedQKV):
            layout = WithoutDummyHeads(config.vision.hidden_size, heads, 0, rule.layout, sections=3)
            rule = dataclasses.replace(rule, layout=layout)
        elif rule.ours.startswith("vision."):
            # the projection's bias is not split over heads, so its weight gets a row of its own
            if rule.ours.endswith("linear_proj.{leaf}"):
                rules.append(_with_leaf(rule, "bias"))
                rule = _with_leaf(rule, "weight")
            dim = next((dim for end, dim in dimensions.items() if rule.ours.endswith(end)), None)
            if dim is not None:
                layout = WithoutDummyHeads(config.vision.hidden_size, heads, dim, rule.layout)
                rule = dataclasses.replace(rule, layout=layout)
        rules.append(rule)
    return dataclasses.replace(original, rules=tuple(rules))


def _with_leaf(rule: Rule, leaf: str) -> Rule:
    return dataclasses.replace(
        rule,
        ours=rule.ours.replace("{leaf}", leaf),
        theirs=tuple(name.replace("{leaf}", leaf) for name in rule.theirs),
    )
