"""What becomes of a dense model: which layers get experts, of what size, and with which factor they start equal.

A dense feed-forward layer is ``y = W2 (silu(Wg x) * (Wv x))``, F wide. Cut into G shards along F it is the sum of G
narrow layers. N experts are N / G copies of each shard; expert e holds shard ``e % G`` and belongs to virtual group
``e // G``, whose G rows of the router are equal (Upcycling LLMs into MoE, arXiv 2410.07524). G = 1 are plain copies.

Each expert's second matrix is multiplied by a constant c; the first is left alone, since SwiGLU does not pass a factor
on. A token that goes to whole groups only gets ``c * sum over groups (p / G) * y = c y / G``, where p, the weight of a
group, sums to 1 over the chosen: with c = G that is y, exactly, whatever the router says. Rows that are equal give
scores that are equal (or differ in their last bit), so the k best are whole groups if k is a multiple of G: no tie is
ever decided. Otherwise one group is chosen in part, and which of its shards come is up to ``torch.topk``.

With the softmax over all experts the weights of the chosen sum to something below 1 that differs from token to token.
Then c is what would be exact if all scores were equal, ``N G / (k s)`` with s the factor on the weights; and it is
exact if all experts are chosen (k = N).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from megavlm.models.language import LanguageConfig
from megavlm.models.moe import MoEConfig

OPTION_OF_FIELD = {
    "num_moe_experts": "--num-experts",
    "moe_layer_freq": "--every, --first or --layers",
    "moe_router_topk": "--top-k",
    "moe_router_pre_softmax": "--pre-softmax",
    "moe_router_topk_scaling_factor": "--topk-scaling",
    "moe_ffn_hidden_size": "--granularity",
}
"""Fields of ``model.language.moe`` that :class:`UpcycleSettings` decide, and the option that says each."""


@dataclass(frozen=True)
class UpcycleSettings:
    """How a dense model is made into one with experts."""

    num_experts: int
    """N: experts of a layer, shards counted."""
    top_k: int = 2
    """k: experts that each token goes to, shards counted."""
    every: int = 1
    """One layer in so many has experts."""
    first: int = 0
    """The first that has, counted from 0."""
    layers: tuple[int, ...] | None = None
    """The layers that have, instead of ``every`` and ``first``."""
    granularity: int = 1
    """G: shards that a dense layer is cut into."""
    noise: float = 0.0
    """Standard deviation of what is added to every weight of every expert."""
    router_std: float | None = None
    """Standard deviation of the router; None: the model's ``init_method_std``."""
    pre_softmax: bool = False
    """Softmax over all experts, before the choice."""
    topk_scaling: float | None = None
    """s: factor on the weights of the chosen; only with ``pre_softmax``."""
    seed: int = 1234
    """Of router and noise."""

    def check(self, language: LanguageConfig) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: names the option, its value and what it must fit.
        """
        for option, value, least in (("granularity", self.granularity, 1), ("every", self.every, 1)):
            if value < least:
                raise ValueError(f"--{option}={value}: must be at least {least}.")
        if self.granularity > 1 and language.ffn_hidden_size % self.granularity:
            raise ValueError(
                f"--granularity={self.granularity}: does not divide model.language.ffn_hidden_size="
                f"{language.ffn_hidden_size}. Choose a divisor."
            )
        if self.num_experts % self.granularity:
            raise ValueError(
                f"--num-experts={self.num_experts}: is no multiple of --granularity={self.granularity}, and each shard "
                "needs as many copies as the others. Change one."
            )
        if not 0.0 <= self.noise < math.inf:
            raise ValueError(f"--noise={self.noise}: is no standard deviation. Give 0 or more.")
        if self.router_std is not None and not 0.0 < self.router_std < math.inf:
            raise ValueError(
                f"--router-std={self.router_std}: must be above 0: equal scores would send every token to the same "
                "experts."
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed={self.seed}: is no 64-bit number. Choose another.")

    def chosen_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers with experts, ascending.

        Raises:
            ValueError: a layer is out of range or given twice, or there is none.
        """
        if self.layers is None:
            if not 0 <= self.first < num_layers:
                raise ValueError(
                    f"--first={self.first}: the language model has {num_layers} layers, counted from 0. Choose one of "
                    "them."
                )
            return tuple(range(self.first, num_layers, self.every))
        outside = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if outside or not self.layers or len(set(self.layers)) < len(self.layers):
            problem = f"{outside} are not among" if outside else "are not a list of distinct layers of"
            raise ValueError(
                f"--layers={','.join(map(str, self.layers))}: {problem} the {num_layers} of the language model, "
                "counted from 0."
            )
        return tuple(sorted(self.layers))

    def moe_fields(self, language: LanguageConfig) -> dict[str, Any]:
        """Return what these settings say of ``model.language.moe``.

        Raises:
            ValueError: they do not fit the model.
        """
        self.check(language)
        width = language.ffn_hidden_size // self.granularity
        return {
            "num_moe_experts": self.num_experts,
            "moe_layer_freq": simplest_spelling(self.chosen_layers(language.num_layers), language.num_layers),
            "moe_router_topk": self.top_k,
            "moe_router_pre_softmax": self.pre_softmax,
            "moe_router_topk_scaling_factor": self.topk_scaling,
            "moe_ffn_hidden_size": None if self.granularity == 1 else width,
        }

    @property
    def fc2_scale(self) -> float:
        """c: factor on each expert's second matrix."""
        if not self.pre_softmax:
            return float(self.granularity)
        return self.num_experts * self.granularity / (self.top_k * (self.topk_scaling or 1.0))

    def reasons_not_exact(self, moe: MoEConfig, dtypes: Collection[torch.dtype]) -> list[str]:
        """Say why the model does not start as the dense one; nothing if it does, up to rounding of float32.

        Args:
            moe: of the model, overrides included.
            dtypes: of the dense feed-forward weights.
        """
        reasons = []
        if self.top_k % self.granularity:
            reasons.append(
                f"--top-k={self.top_k} is no multiple of --granularity={self.granularity}, so of one group a token "
                "gets only some of the shards"
            )
        if self.pre_softmax and self.top_k < self.num_experts:
            reasons.append(
                "--pre-softmax: the weights of the chosen experts sum to less than 1, by a share that differs from "
                f"token to token (the second matrices are multiplied by {self.fc2_scale:g}, as if all scores were "
                "equal)"
            )
        if self.noise:
            reasons.append(f"--noise={self.noise:g} changes every expert")
        if moe.moe_expert_capacity_factor is not None:
            reasons.append(
                f"model.language.moe.moe_expert_capacity_factor={moe.moe_expert_capacity_factor:g}: tokens beyond an "
                "expert's capacity are dropped"
            )
        rounded = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.itemsize < 4)
        if rounded and math.frexp(self.fc2_scale)[0] != 0.5:
            reasons.append(
                f"the weights are {' and '.join(rounded)}, in which a matrix times {self.fc2_scale:g} is rounded"
            )
        return reasons


def simplest_spelling(layers: tuple[int, ...], num_layers: int) -> int | list[int]:
    """Return ``moe_layer_freq`` for ascending layers: n where they are 0, n, 2n ..., else a 1 or 0 for each layer."""
    for interval in range(1, num_layers + 1):
        if layers == tuple(range(0, num_layers, interval)):
            return interval
    return [int(layer in layers) for layer in range(num_layers)]
