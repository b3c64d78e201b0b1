"""Counts over samples, source by source."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from megavlm.batch import SkippedSample
from megavlm.data import Dataset, SampleError, SampleProcessor
from megavlm.data.blend import order_of, source_of
from megavlm.data.expansion import expand
from megavlm.inspection.view import SampleView, SkippedView

T = TypeVar("T")


@dataclass(frozen=True)
class SampleCounts:
    """The numbers of one sample."""

    source: str
    key: str
    num_tokens: int
    num_trained_tokens: int
    num_image_tokens: int
    """Positions that hold an image feature."""
    tiles_per_image: tuple[int, ...]
    num_degraded: int
    num_dropped_images: int
    is_cut: bool


@dataclass
class SourceSummary:
    """What the samples of one source are like."""

    name: str
    num_samples: int = 0
    """That can be used."""
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_image_tokens: int = 0
    num_images: int = 0
    num_tiles: int = 0
    num_degraded: int = 0
    """Images with fewer tiles than their tiling chose."""
    num_dropped_images: int = 0
    num_cut: int = 0
    """Samples whose end was cut off."""
    tiles_per_image: dict[int, int] = field(default_factory=dict)
    """How many images have how many tiles."""
    lengths: dict[int, int] = field(default_factory=dict)
    """How many samples have how many tokens."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many samples cannot be used, and why."""

    @property
    def num_unusable(self) -> int:
        """Samples that cannot be used."""
        return sum(self.reasons.values())


def counts_of(view: SampleView) -> SampleCounts:
    """The numbers of a sample that was made."""
    sample = view.sample
    return SampleCounts(
        view.source,
        sample.key,
        sample.num_tokens,
        sample.num_trained_tokens,
        int(sample.tile_spans.diff(dim=1).sum()),
        tuple(sample.tiles_per_image.tolist()),
        sample.num_degraded,
        sample.num_dropped_images,
        sample.is_cut,
    )


def count_samples(
    dataset: Dataset,
    source_names: Sequence[str],
    processor: SampleProcessor,
    positions: Sequence[int],
    seed: int,
    shuffle: bool,
) -> Iterator[SampleCounts | SkippedView]:
    """Count what the samples at some positions would have, from their images' headers; no pixels are read.

    Args:
        dataset, source_names, processor, positions, seed, shuffle: as of
            :func:`megavlm.inspection.view.view_samples`.
    """
    order = order_of(dataset, seed, shuffle)
    for position in positions:
        row = order.row(position)
        source = source_names[source_of(dataset, row)]
        try:
            key, conversation = dataset[row]
        except ValueError as error:
            yield SkippedView(source, SkippedSample(f"row {row}", "row_malformed", str(error)))
            continue
        try:
            plan = processor.plan(key, conversation)
        except SampleError as error:
            yield SkippedView(source, error.skipped)
            continue
        tokens = [image.tokens for image in plan.images]
        expansion = expand(plan.runs, tokens, processor.tokenizer.image_token_id, processor.route.text_sees)
        yield SampleCounts(
            source,
            key,
            plan.num_tokens,
            int(expansion.loss_mask.count_nonzero()),
            int(expansion.tile_spans.diff(dim=1).sum()),
            tuple(image.layout.num_tiles for image in plan.images),
            sum(image.is_degraded for image in plan.images),
            plan.num_dropped_images,
            plan.is_cut,
        )


def summarize(counted: Iterable[SampleCounts | SkippedView], source_names: Sequence[str]) -> list[SourceSummary]:
    """Add up, for each source."""
    summaries = {name: SourceSummary(name) for name in source_names}
    for one in counted:
        summary = summaries[one.source]
        if isinstance(one, SkippedView):
            _count(summary.reasons, one.skipped.reason)
            continue
        summary.num_samples += 1
        summary.num_tokens += one.num_tokens
        summary.num_trained_tokens += one.num_trained_tokens
        summary.num_image_tokens += one.num_image_tokens
        summary.num_images += len(one.tiles_per_image)
        summary.num_tiles += sum(one.tiles_per_image)
        summary.num_degraded += one.num_degraded
        summary.num_dropped_images += one.num_dropped_images
        summary.num_cut += one.is_cut
        _count(summary.lengths, one.num_tokens)
        for num_tiles in one.tiles_per_image:
            _count(summary.tiles_per_image, num_tiles)
    return list(summaries.values())


def _count(counts: dict[T, int], what: T) -> None:
    counts[what] = counts.get(what, 0) + 1
