"""What a run's data looks like while it trains: padding, samples in a row, and the part of each source."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from megavlm.batch import Batch
from megavlm.engines import MegatronEngine, StepResult


@dataclass(frozen=True)
class SourceNumbers:
    """What came from a data source in some steps. Shares are of the whole."""

    name: str
    sample_share: float
    token_share: float
    """Of the tokens without padding."""
    trained_token_share: float
    loss: float | None
    """Mean of its trained tokens, whatever their weight; None if it had none."""

    def log_text(self) -> str:
        """The piece of the log line."""
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        shares = (self.sample_share, self.token_share, self.trained_token_share)
        return f"{self.name}: " + " / ".join(f"{100.0 * share:.2f}%" for share in shares) + f", loss {loss}"


@dataclass(frozen=True)
class DataNumbers:
    """What the micro-batches of some steps held, over all ranks."""

    padding_share: float
    """Padding among all positions."""
    samples_per_row: float
    row_fill: float
    """Tokens without padding, of ``data.seq_length`` for each row."""
    sources: list[SourceNumbers]
    """Empty where the run has one source only."""

    def log_text(self, *, is_packed: bool) -> str:
        """The piece of the log line."""
        packed = f" samples per row: {self.samples_per_row:.2f} | row fill: {100.0 * self.row_fill:.1f}% |"
        return f" padding: {100.0 * self.padding_share:.1f}% |" + (packed if is_packed else "")

    def points(self) -> dict[str, float]:
        """TensorBoard's scalars."""
        points = {
            "padding-share": self.padding_share,
            "samples-per-row": self.samples_per_row,
            "row-fill": self.row_fill,
        }
        for source in self.sources:
            points[f"source/{source.name}/samples"] = source.sample_share
            points[f"source/{source.name}/tokens"] = source.token_share
            points[f"source/{source.name}/trained tokens"] = source.trained_token_share
            if source.loss is not None:
                points[f"source/{source.name}/loss"] = source.loss
        return points


@dataclass
class SampleCounts:
    """Samples and images of this rank, since the run (re)started, that were not used as they are."""

    skipped: int = 0
    degraded_images: int = 0
    dropped_images: int = 0
    cut: int = 0

    def add(self, batches: Sequence[Batch]) -> None:
        """Take in a step's micro-batches."""
        for batch in batches:
            self.skipped += len(batch.skipped)
            self.degraded_images += batch.num_degraded
            self.dropped_images += batch.num_dropped_images
            self.cut += batch.num_cut_samples

    def over_replicas(self, engine: MegatronEngine) -> "SampleCounts":
        """Those of all ranks."""
        return SampleCounts(*map(int, engine.sum_over_replicas(list(astuple(self)))))

    def log_text(self) -> str:
        """The piece of the log line."""
        return (
            f" skipped samples: {self.skipped} |"
            f" images with fewer tiles: {self.degraded_images} |"
            f" images left out: {self.dropped_images} |"
            f" samples cut off: {self.cut} |"
        )

    def points(self) -> dict[str, float]:
        """TensorBoard's scalars."""
        return {
            "skipped-samples": self.skipped,
            "degraded-images": self.degraded_images,
            "dropped-images": self.dropped_images,
            "cut-samples": self.cut,
        }


class DataReport:
    """Counts what the micro-batches hold. Every rank calls the same methods at the same time."""

    def __init__(self, engine: MegatronEngine, source_names: Sequence[str], seq_length: int) -> None:
        """Begin to count.

        Args:
            engine: adds up over the data-parallel ranks.
            source_names: in the order of ``Batch.sources``.
            seq_length: of a full row.
        """
        self._engine = engine
        self._names = list(source_names)
        self._seq_length = seq_length
        self._clear()

    def _clear(self) -> None:
        # samples, tokens, trained tokens by source; then positions and rows
        self._counts = torch.zeros(3, len(self._names), dtype=torch.float64)
        self._num_positions = self._num_rows = 0
        self._losses = [0.0] * len(self._names)

    def add(self, result: StepResult, batches: Sequence[Batch]) -> None:
        """Take in one step: what it did, and this rank's micro-batches."""
        for batch in batches:
            self._num_positions += batch.tokens.numel()
            self._num_rows += batch.tokens.shape[0]
            self._counts += _count(batch, len(self._names))
        if result.source_losses:
            self._losses = [before + loss for before, loss in zip(self._losses, result.source_losses, strict=True)]

    def take(self) -> DataNumbers | None:
        """Sum up the steps since the last call over all ranks; None if there was no token."""
        num_sources = len(self._names)
        summed = self._engine.sum_over_replicas(
            [*self._counts.flatten().tolist(), float(self._num_positions), float(self._num_rows)]
        )
        losses = self._losses
        self._clear()
        counts, (num_positions, num_rows) = torch.tensor(summed[:-2]).view(3, num_sources), summed[-2:]
        num_samples, num_tokens, _ = totals = counts.sum(1).tolist()
        if not num_tokens:
            return None
        shares = (counts / torch.tensor(totals).clamp(min=1.0).unsqueeze(1)).tolist()
        sources = [
            SourceNumbers(
                name,
                shares[0][number],
                shares[1][number],
                shares[2][number],
                losses[number] / counts[2, number].item() if counts[2, number] else None,
            )
            for number, name in enumerate(self._names)
        ]
        return DataNumbers(
            padding_share=1.0 - num_tokens / num_positions,
            samples_per_row=num_samples / num_rows,
            row_fill=num_tokens / (num_rows * self._seq_length),
            sources=sources if num_sources > 1 else [],
        )


def _count(batch: Batch, num_sources: int) -> torch.Tensor:
    """``[3, num_sources]`` float64 on the CPU: samples, tokens without padding, and trained tokens of each source."""
    padding = batch.is_padding()
    is_token = torch.ones_like(batch.tokens, dtype=torch.bool) if padding is None else ~padding
    sources = batch.source_of_tokens()
    # a row without any sample is bounded as if it had one
    starts = batch.cu_seqlens[:-1].to(torch.int64)
    is_sample = is_token.flatten()[starts]
    parts = (sources.flatten()[starts][is_sample], sources[is_token], sources[batch.loss_mask > 0])
    return torch.stack([torch.bincount(part.flatten().cpu(), minlength=num_sources) for part in parts]).double()
