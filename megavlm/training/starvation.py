"""Warns of experts that get so few tokens that they do not learn."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megavlm.models.moe import MoEConfig
from megavlm.runtime.log import LOGGER

STARVES_BELOW = 0.1
"""An expert starves that gets less than this much of its even share of the tokens of a log interval."""
RECOVERS_ABOVE = 0.5
"""It has recovered, and is warned of anew, after it got more than this: an expert near the limit is told once."""
ENOUGH_CHOICES = 100
"""Nothing is said of tokens so few that the even share is below this many choices: there 10 % can be chance."""
MOST_WARNINGS = 5
"""Experts named in one log interval; of the others only the number is told."""


class Tokens(Protocol):
    """What some of the tokens of a log interval chose."""

    @property
    def name(self) -> str:
        """``all`` or a modality."""

    @property
    def choices(self) -> Tensor:
        """``[L, E]``: how often each expert was chosen."""


class StarvationAlarm:
    """Keeps who starves, so that each is told once until it recovers."""

    def __init__(self, moe: MoEConfig, layers: Sequence[int], *, is_trained: bool) -> None:
        """Begin with nobody starving.

        Args:
            moe: of the model, for the advice.
            layers: indices of the layers with experts, in the order of the views' rows.
            is_trained: whether the routers learn.
        """
        self._moe = moe
        self._layers = layers
        self._is_trained = is_trained
        self._starving: set[tuple[str, int, int]] = set()

    def check(self, everything: Tokens, modalities: Sequence[Tokens], num_steps: int) -> None:
        """Warn of experts that began to starve.

        An expert that starves of all tokens is told of once, not for each modality too.

        Args:
            everything: all tokens of the last steps.
            modalities: the same, by modality.
            num_steps: how many steps.
        """
        warnings = []
        for tokens in (everything, *modalities):
            for row, expert in self._began_to_starve(tokens):
                is_known = any((name, row, expert) in self._starving for name in ("all", tokens.name))
                self._starving.add((tokens.name, row, expert))
                if not is_known:
                    warnings.append(self._text(tokens, row, expert, num_steps))
        for text in warnings[:MOST_WARNINGS]:
            LOGGER.warning("%s", text)
        if len(warnings) > MOST_WARNINGS:
            LOGGER.warning("%d more experts began to starve; router.png shows them", len(warnings) - MOST_WARNINGS)

    def _began_to_starve(self, tokens: Tokens) -> list[tuple[int, int]]:
        """Rows and experts that starve and did not before; those that recovered are forgotten."""
        means = tokens.choices.mean(dim=1, keepdim=True)
        loads = tokens.choices / means
        known = {(row, expert) for name, row, expert in self._starving if name == tokens.name}
        has_enough = means >= ENOUGH_CHOICES
        for row, expert in ((loads > RECOVERS_ABOVE) & has_enough).nonzero().tolist():
            self._starving.discard((tokens.name, row, expert))
        starving = ((loads < STARVES_BELOW) & has_enough).nonzero().tolist()
        return [(row, expert) for row, expert in starving if (row, expert) not in known]

    def _text(self, tokens: Tokens, row: int, expert: int, num_steps: int) -> str:
        choices = tokens.choices[row]
        share = choices[expert] / choices.sum()
        which = "tokens" if tokens.name == "all" else f"{tokens.name} tokens"
        effect = "it starves" if tokens.name == "all" else "it learns nothing of them, only of the others"
        return (
            f"layer {self._layers[row]}: expert {expert} got {100.0 * share:.1f} % of the {which} over the last "
            f"{num_steps} steps (even share {100.0 / len(choices):.1f} %): {effect}. {self._advice()}"
        )

    def _advice(self) -> str:
        where = "model.language.moe"
        if not self._is_trained:
            return "The routers are frozen: add language to training.trainable, or start from other weights."
        if self._moe.moe_router_load_balancing_type == "none":
            return f"Set {where}.moe_router_load_balancing_type=aux_loss."
        return (
            f"Raise {where}.moe_aux_loss_coeff={self._moe.moe_aux_loss_coeff:g}, lower the learning rate, or have "
            f"fewer experts than num_moe_experts={self._moe.num_moe_experts}."
        )
