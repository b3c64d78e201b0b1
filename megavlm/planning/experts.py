"""Counts what the experts of a language model hold, and how much of it a token meets."""

from dataclasses import dataclass

from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.language import LanguageConfig


@dataclass(frozen=True)
class ExpertParameters:
    """Parameters of all layers with experts together; they are part of the language model's."""

    experts: int
    """Of all experts."""
    active_experts: int
    """Of those that one token goes to."""
    router: int

    @property
    def idle(self) -> int:
        """Parameters that a token does not meet: the whole model's less these are active."""
        return self.experts - self.active_experts


def expert_width(language: LanguageConfig) -> int:
    """Width inside one expert; the dense layers' where the recipe gives none."""
    given = None if language.moe is None else language.moe.moe_ffn_hidden_size
    return given or language.ffn_hidden_size


def count_experts(language: LanguageConfig | QFormerTextConfig) -> ExpertParameters:
    """Count by hand: an expert has gate, value and output (SwiGLU, no bias), a router a row for each expert."""
    if language.moe is None:
        return ExpertParameters(0, 0, 0)
    num_layers, width = len(language.layers_with_experts), language.hidden_size
    expert = 3 * width * expert_width(language)
    return ExpertParameters(
        experts=num_layers * language.moe.num_moe_experts * expert,
        active_experts=num_layers * language.moe.moe_router_topk * expert,
        router=num_layers * language.moe.num_moe_experts * width,
    )
