"""What an engine is asked about its place in the pipeline, and what it tells of a step."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """Where a model chunk stands in the pipeline: what a chunk builder needs to know."""

    pre_process: bool
    post_process: bool
    vp_stage: int | None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. The same on every rank."""

    loss: float
    """Mean loss of the trained tokens of the global batch, each by its weight, and of its rows, where those have
    losses of their own; 0.0 if there were none."""
    num_trained_tokens: int
    grad_norm: float
    """Global norm before clipping; nan or inf if the step was skipped for it; 0.0 if nothing was trained."""
    skip_reason: str | None
    """Why the weights were not updated: ``no_trained_token``, ``grad_not_finite``, ``loss_spike``; None: they were."""
    source_losses: tuple[float, ...] = ()
    """Summed loss of the trained tokens of each data source, whatever their weight; empty if only one is counted."""
    loss_terms: Mapping[str, float] = field(default_factory=dict)
    """What ``loss`` is the sum of, by name; empty if it is one thing."""


@dataclass(frozen=True)
class LossSums:
    """Losses of one global batch or of several together, without training. The same on every rank."""

    loss: float = 0.0
    """Summed over the trained tokens, which count alike whatever their weight. A mean over rows counts as if each
    trained token had it."""
    num_trained_tokens: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)
    """What ``loss`` is the sum of, by name; empty if it is one thing."""

    def __add__(self, other: "LossSums") -> "LossSums":
        """Of both."""
        names = {**self.terms, **other.terms}
        terms = {name: self.terms.get(name, 0.0) + other.terms.get(name, 0.0) for name in names}
        return LossSums(self.loss + other.loss, self.num_trained_tokens + other.num_trained_tokens, terms)

    def mean(self) -> float:
        """Of a trained token; 0.0 if there is none."""
        return self.loss / max(1, self.num_trained_tokens)

    def mean_terms(self) -> dict[str, float]:
        """What :meth:`mean` is the sum of, by name."""
        return {name: term / max(1, self.num_trained_tokens) for name, term in self.terms.items()}
