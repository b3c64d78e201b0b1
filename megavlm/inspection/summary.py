"""Counts over samples, source by source."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megavlm.inspection.view import SampleView, SkippedView

T = TypeVar("T")


@dataclass
class SourceSummary:
    """What the samples of one source are like."""

    name: str
    num_samples: int = 0
    """That can be used."""
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_tiles: int = 0
    num_degraded: int = 0
    """Images with fewer tiles than their tiling chose."""
    num_dropped_images: int = 0
    num_cut: int = 0
    """Samples whose end was cut off."""
    tiles_per_image: dict[int, int] = field(default_factory=dict)
    """How many images have how many tiles."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many samples cannot be used, and why."""


def summarize(views: Iterable[SampleView | SkippedView], source_names: Sequence[str]) -> list[SourceSummary]:
    """Count, for each source."""
    summaries = {name: SourceSummary(name) for name in source_names}
    for view in views:
        summary = summaries[view.source]
        if isinstance(view, SkippedView):
            _count(summary.reasons, view.skipped.reason)
            continue
        sample = view.sample
        summary.num_samples += 1
        summary.num_tokens += sample.num_tokens
        summary.num_trained_tokens += sample.num_trained_tokens
        summary.num_tiles += sample.tiles.shape[0]
        summary.num_degraded += sample.num_degraded
        summary.num_dropped_images += sample.num_dropped_images
        summary.num_cut += sample.is_cut
        for num_tiles in sample.tiles_per_image.tolist():
            _count(summary.tiles_per_image, num_tiles)
    return list(summaries.values())


def _count(counts: dict[T, int], what: T) -> None:
    counts[what] = counts.get(what, 0) + 1
