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
