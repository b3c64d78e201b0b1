"""Watches the loss for spikes and for steps that are not finite, and decides what becomes of them.

The decision depends on the losses alone, which are the same on every rank, and its memory is saved with the run: a
resumed run decides as it would have decided without the interruption.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megavlm.engines import StepResult
from megavlm.recipe import LossSpikeConfig

_MOST_KEYS = 16  # sample keys that the log names; the metrics file has all of them


@dataclass(frozen=True)
class Spike:
    """A step that stood out."""

    iteration: int
    loss: float
    median: float | None
    """Of the losses before; None if the loss or the gradient was not finite."""
    num_losses: int
    """How many of those there were; or how many steps in a row were not finite."""
    must_rewind: bool

    def text(self) -> str:
        """What happened, for the log."""
        if self.median is None:
            return (
                f"loss or gradient was not finite in {self.num_losses} step(s) in a row, last in step {self.iteration}"
            )
        return (
            f"loss spike in step {self.iteration}: {self.loss:.4f} is {self.loss / self.median:.2f} times the median "
            f"{self.median:.4f} of the last {self.num_losses} losses"
        )


class SpikeWatch:
    """Remembers the last losses."""

    def __init__(self, config: LossSpikeConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._num_nans_in_a_row = 0
        self.num_spikes = 0
        """Since the run (re)started."""
        self.num_rewinds = 0
        """Of the whole run."""

    @property
    def decides_updates(self) -> bool:
        """Whether :meth:`accepts` is to be asked before an update."""
        return self._config.action != "warn"

    def accepts(self, loss: float) -> bool:
        """Whether the weights may be updated after this loss."""
        return not self._is_spike(loss)

    def take(self, iteration: int, result: StepResult) -> Spike | None:
        """Take in what a step did.

        Returns:
            What is to be told of it, if anything.
        """
        if not result.num_trained_tokens:
            return None
        rewinds = self._config.action == "rewind"
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)) and result.skip_reason != "loss_spike":
            self._num_nans_in_a_row += 1
            must_rewind = rewinds and self._num_nans_in_a_row >= self._config.rewind_after_nans
            return Spike(iteration, result.loss, None, self._num_nans_in_a_row, must_rewind) if must_rewind else None
        self._num_nans_in_a_row = 0
        # some rank may have seen a spike that this one did not; what was done is the same on all
        is_spike = result.skip_reason == "loss_spike" if self.decides_updates else self._is_spike(result.loss)
        spike = None
        if is_spike:
            self.num_spikes += 1
            spike = Spike(iteration, result.loss, statistics.median(self._losses), len(self._losses), rewinds)
        self._losses.append(result.loss)
        return spike

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < self._config.min_losses or not math.isfinite(loss):
            return False
        return loss > self._config.factor * statistics.median(self._losses)

    def check_may_go_back(self, spike: Spike) -> None:
        """Check that the run may be put back once more.

        Raises:
            ValueError: it was put back as often as it may be.
        """
        if self.num_rewinds >= self._config.max_rewinds:
            raise ValueError(
                f"training.loss_spike.max_rewinds={self._config.max_rewinds}: the run was put back {self.num_rewinds} "
                f"times, and would have to be again: {spike.text()}. Look at the samples that the log names, lower "
                "training.optimizer.lr, or raise factor."
            )

    def go_back(self, saved: Mapping[str, Any] | None) -> None:
        """Count a rewind, and know no more than at the checkpoint.

        Args:
            saved: :meth:`to_json` of that time.
        """
        num_rewinds = self.num_rewinds + 1
        self.restore(saved)
        self.num_rewinds = num_rewinds

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self._losses),
            "num_nans_in_a_row": self._num_nans_in_a_row,
            "num_rewinds": self.num_rewinds,
        }

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Take back what a checkpoint kept; None: of a run that did not watch."""
        saved = saved or {"losses": [], "num_nans_in_a_row": 0, "num_rewinds": 0}
        self._losses = deque(saved["losses"], maxlen=self._config.window)
        self._num_nans_in_a_row = saved["num_nans_in_a_row"]
        self.num_rewinds = saved["num_rewinds"]

    def log_text(self) -> str:
        """The piece of the log line."""
        return f" loss spikes: {self.num_spikes:3d} | rewinds: {self.num_rewinds:3d} |"

    def points(self) -> dict[str, float]:
        """For TensorBoard."""
        return {"loss-spikes": float(self.num_spikes), "rewinds": float(self.num_rewinds)}


def name_samples(keys: Sequence[str]) -> str:
    """The first of the samples of a step, for the log."""
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return f"{', '.join(keys[:_MOST_KEYS])}{more}" if keys else "unknown"
