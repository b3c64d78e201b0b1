"""Choosing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The default is greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0: the most likely token."""
    top_k: int | None = None
    """Only so many of the most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together have at least this probability (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0
    """Each row draws from a stream of its own, so an answer does not depend on what it is generated beside."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: names the setting.
        """
        if self.temperature < 0.0:
            raise ValueError(f"temperature={self.temperature}: is below 0. Give 0 (greedy) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: leaves no token. Give 1 or more.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: is no probability above 0. Give more than 0 and at most 1.")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"temperature=0: is greedy, so top_k={self.top_k} and top_p={self.top_p} would have no effect. Give a "
                "temperature, or leave them out."
            )

    def streams(self, num_rows: int) -> list[torch.Generator]:
        """A random stream for each row."""
        return [torch.Generator().manual_seed(self.seed * 1_000_003 + row) for row in range(num_rows)]


def choose(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """Choose a token for each row. The same on every rank that has the same logits.

    Args:
        logits: ``[N, V]`` float32.
        sampling: how.
        streams: of the rows.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1).tolist()
    probabilities = (logits.float().cpu() / sampling.temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = 0.0
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if sampling.top_p is not None:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    return [
        int(tokens[row, torch.multinomial(ordered[row], 1, generator=stream)]) for row, stream in enumerate(streams)
    ]
