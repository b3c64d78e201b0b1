"""Compares what both sides answered. Shape letters: S tokens, V tokens of the vocabulary, P patches, D width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.convert.receipt.probe import Probe

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Of logits or features in float32, relative to the largest value."""
MAX_KL = 1e-6
"""Of the next token's distribution, at any position, in nats."""
NUM_NEW_TOKENS = 8
"""Of the greedy continuation, which must be the same."""


@dataclass(frozen=True)
class Answers:
    """One side's answers, one for each probe."""

    outputs: list[Tensor]
    """Logits ``[S, V]``, or of a vision encoder alone features ``[P, D]``."""
    continuations: list[list[int]]
    """Greedy tokens; empty for features."""


@dataclass(frozen=True)
class OutputRow:
    """How far apart both sides are on one probe."""

    name: str
    kind: str
    """``logits`` or ``features``."""
    num_positions: int
    max_abs: float
    max_rel: float
    mean_kl: float | None
    max_kl: float | None
    theirs: list[int]
    """Their greedy tokens."""
    ours: list[int]

    @property
    def faults(self) -> list[str]:
        """What is over the limits. A difference that is no number is over them."""
        found = []
        if not self.max_rel <= MAX_RELATIVE_DIFFERENCE:
            found.append(f"relative {self.kind} difference {self.max_rel:.3g} > {MAX_RELATIVE_DIFFERENCE:g}")
        if self.max_kl is not None and not self.max_kl <= MAX_KL:
            found.append(f"KL divergence {self.max_kl:.3g} > {MAX_KL:g}")
        if self.theirs != self.ours:
            found.append(f"greedy tokens {self.ours}, theirs {self.theirs}")
        return [f"{self.name}: {fault}" for fault in found]


def compare_outputs(probes: Sequence[Probe], theirs: Answers, ours: Answers) -> list[OutputRow]:
    """Compare answers to the same probes."""
    sides = zip(probes, theirs.outputs, ours.outputs, theirs.continuations, ours.continuations, strict=True)
    return [_compare(probe, expected, found, tokens, own) for probe, expected, found, tokens, own in sides]


def _compare(
    probe: Probe, expected: Tensor, found: Tensor, their_tokens: list[int], our_tokens: list[int]
) -> OutputRow:
    is_text = probe.tokens.numel() > 0
    kind = "logits" if is_text else "features"
    assert expected.shape == found.shape, (probe.name, expected.shape, found.shape)
    max_abs = float((found - expected).abs().max())
    max_rel = max_abs / max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    mean_kl = max_kl = None
    if is_text:
        divergence = _divergence(expected, found)
        mean_kl, max_kl = float(divergence.mean()), float(divergence.max())
    if not math.isfinite(max_rel):
        max_abs = max_rel = math.inf
    return OutputRow(probe.name, kind, len(expected), max_abs, max_rel, mean_kl, max_kl, their_tokens, our_tokens)


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(theirs || ours) at each position ``[S]``, in float64, row by row to spare memory."""
    rows = []
    for theirs, ours in zip(expected, found, strict=True):
        log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum())
    return torch.stack(rows).clamp(min=0.0)  # rounding can make it a little less
