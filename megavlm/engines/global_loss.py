"""How the losses of micro-batches, on all ranks, become the loss of a global batch.

The loss is the weighted sum over the trained tokens of the global batch divided by the sum of their weights (by their
number, where all are 1), so it does not depend on micro-batch size, accumulation, packing or data parallelism. Losses
of whole rows are summed over the rows that train anything and divided by their number, and added.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megavlm.batch import Batch
from megavlm.engines import guards


@dataclass(frozen=True)
class Count:
    """What a global batch holds. The same on every rank."""

    trained_tokens: int
    weight_sum: float
    """Of the trained tokens."""


@dataclass(frozen=True)
class Sums:
    """Losses of a global batch, not divided. The same on every rank."""

    loss: float
    sources: list[float]
    """Of the trained tokens of each source, whatever their weight; empty if they are not told apart."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """What ``loss`` is the sum of, by name; empty if it is one thing."""


class GlobalLoss:
    """Settled for each global batch, then asked for each of its micro-batches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.num_sources = 1
        """Data sources (``Batch.sources``) whose losses are told apart."""
        self.auxiliary_scale = 1.0
        """What losses of routers, sums over tokens, are multiplied by."""
        self._scale = 1.0
        self._row_weight = 1.0
        """What losses of rows are multiplied by before they are divided as those of tokens are."""

    def settle(self, batches: Sequence[Batch]) -> Count:
        """Count the global batch that these micro-batches are this rank's share of. Collective over replicas."""
        total = torch.zeros(4, dtype=torch.float64, device=self._device)
        for batch in batches:
            weights = batch.loss_mask.to(torch.float64)
            num_rows = (weights > 0).any(1).count_nonzero()
            total += torch.stack([weights.count_nonzero(), batch.num_tokens, weights.sum(), num_rows])
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        num_trained, num_tokens, weight_sum, num_rows = total.tolist()
        self._row_weight = weight_sum / max(1.0, num_rows)
        if num_trained:
            self._scale, self.auxiliary_scale = 1.0 / weight_sum, 1.0 / num_tokens
        return Count(int(num_trained), weight_sum)

    def scale(self, loss: Tensor) -> Tensor:
        """Called by megatron-core's schedule on each micro-batch's summed loss."""
        return loss * self._scale

    def forward_step(self, iterator: Iterator[Batch], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        """megatron-core's forward step: run a chunk on the next micro-batch, say how its output becomes a loss."""
        batch = next(iterator)

        def sum_losses(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            losses, of_rows = output if isinstance(output, tuple) else (output, None)
            loss_sum = (losses * batch.loss_mask).sum()
            metrics = {}
            if of_rows is not None:
                row_sums = of_rows.sum(0) * self._row_weight
                metrics["term_sums"] = torch.cat([loss_sum.unsqueeze(0), row_sums])
                loss_sum = loss_sum + row_sums.sum()
            metrics["loss_sum"] = loss_sum
            if self.num_sources > 1:
                unweighted = (losses.detach() * (batch.loss_mask > 0)).to(torch.float64).flatten()
                zeros = unweighted.new_zeros(self.num_sources)
                metrics["source_sums"] = zeros.index_add(0, batch.source_of_tokens().flatten(), unweighted)
            return loss_sum, torch.zeros((), dtype=torch.int), guards.own_metrics(metrics)

        return module(batch), sum_losses

    def sum_up(
        self, outputs: Sequence[Mapping[str, Tensor]], names: Sequence[str], share: Callable[[Tensor], None]
    ) -> Sums:
        """Add up what :meth:`forward_step` reported on the last stage. Collective.

        Args:
            outputs: of this rank's micro-batches; empty on other stages.
            names: of the terms of the loss.
            share: gives the other stages the tensor of the last one, in place.
        """
        num_sources = 0 if self.num_sources == 1 else self.num_sources
        sums = torch.zeros(1 + num_sources + len(names), dtype=torch.float64, device=self._device)
        for output in outputs:
            sums[0] += output["loss_sum"]
            if num_sources:
                sums[1 : 1 + num_sources] += output["source_sums"]
            if names:
                sums[1 + num_sources :] += output["term_sums"]
        share(sums)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        loss, *others = sums.tolist()
        return Sums(loss, others[:num_sources], dict(zip(names, others[num_sources:], strict=True)))
