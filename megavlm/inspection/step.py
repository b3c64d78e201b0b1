"""Micro-batches as a run in one process gets them, and where in them each sample stands."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megavlm.batch import Batch
from megavlm.data import Dataset, LaneProgress, Loader, PackedLoader, Progress, SampleProcessor
from megavlm.inspection.summary import SampleCounts, count_samples
from megavlm.inspection.view import SampleView, SkippedView, view_samples
from megavlm.recipe import Recipe

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True)
class PlacedSample:
    """A sample, and where it stands in its micro-batch."""

    number: int
    """Among all samples, in the order in which rows use them."""
    position: int
    """In the sequence that samples are drawn from; another one only where they are packed."""
    view: SampleView
    row: int
    start: int
    stop: int
    """First place in its row, and the one behind its last."""
    first_tile: int
    """Number of its first tile in the micro-batch."""


@dataclass(frozen=True)
class UnusedSample:
    """A sample that cannot be used."""

    number: int
    position: int
    view: SkippedView


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass gets."""

    step: int
    number: int
    """In its step, before any balancing."""
    batch: Batch
    samples: tuple[PlacedSample | UnusedSample, ...]

    @property
    def placed(self) -> list[PlacedSample]:
        """The samples that are in the rows, in order."""
        return sorted(
            (one for one in self.samples if isinstance(one, PlacedSample)), key=lambda one: (one.row, one.start)
        )


@dataclass(frozen=True)
class Source:
    """The data of a recipe, opened."""

    recipe: Recipe
    split: Split
    dataset: Dataset
    processor: SampleProcessor

    @property
    def names(self) -> list[str]:
        """Of the data sources, in the order of ``Batch.sources``."""
        config = self.recipe.data.train if self.split == "train" else self.recipe.data.valid
        assert config is not None
        return config.source_names

    @property
    def is_packed(self) -> bool:
        """Validation never is."""
        return self.split == "train" and self.recipe.data.packing is not None

    @property
    def shuffle(self) -> bool:
        """Validation takes its rows as they come."""
        return self.split == "train" and self.recipe.data.shuffle

    def views(self, positions: Sequence[int]) -> Iterator[SampleView | SkippedView]:
        """Look at the samples at some positions."""
        return view_samples(
            self.dataset, self.names, self.processor, positions, self.recipe.training.seed, self.shuffle
        )

    def counts(self, positions: Sequence[int]) -> Iterator[SampleCounts | SkippedView]:
        """Count what the samples at some positions have, without reading pixels."""
        return count_samples(
            self.dataset, self.names, self.processor, positions, self.recipe.training.seed, self.shuffle
        )

    def loader(self, num_used: int = 0) -> Loader | PackedLoader:
        """Make the loader of a run in one process, which has used so many samples in their order."""
        training = self.recipe.training
        settings: dict[str, Any] = {
            "micro_batch_size": training.micro_batch_size,
            "global_batch_size": training.global_batch_size,
            "data_parallel_rank": 0,
            "data_parallel_size": 1,
            "seed": training.seed,
            "shuffle": self.shuffle,
            "pad_multiple": self.recipe.engine.pad_multiple,
        }
        if self.split == "train" and self.recipe.data.packing is not None:
            progress = Progress.after(num_used)
            return PackedLoader(self.dataset, self.processor, self.recipe.data.packing, progress=progress, **settings)
        return Loader(
            self.dataset, self.processor, consumed_samples=num_used, endless=self.split == "train", **settings
        )


def micro_batches(source: Source, start: int, stop: int) -> Iterator[MicroBatch]:
    """Give the micro-batches that hold some samples.

    Args:
        source: of the samples.
        start, stop: their numbers, in the order in which rows use them. The first and the last micro-batch hold others
            too.
    """
    global_batch_size = source.recipe.training.global_batch_size
    # Packed rows depend on all rows before them.
    number = 0 if source.is_packed else start // global_batch_size * global_batch_size
    step = number // global_batch_size
    loader = source.loader(number)
    num_lanes = len(loader.lanes)
    before = dict(loader.lanes)
    for batches in loader:
        after = dict(loader.lanes)
        used = [position for lane in before for position in _used(before[lane], after[lane], num_lanes)]
        for count, batch in enumerate(batches):
            if source.is_packed:
                positions = _used(before[count], after[count], num_lanes)
            else:
                positions = used[count * batch.tokens.shape[0] : (count + 1) * batch.tokens.shape[0]]
                positions = [one for one in positions if source.split == "train" or one < len(source.dataset)]
            if number + len(positions) > start and positions:
                yield MicroBatch(step, count, batch, tuple(_placed(source, batch, positions, number)))
            number += len(positions)
            if number >= stop:
                return
        before, step = after, step + 1


def _used(before: LaneProgress, after: LaneProgress, num_lanes: int) -> list[int]:
    """Positions that a lane has used in a step."""
    looked_at = [*before.pending, *range(before.next_position, after.next_position, num_lanes)]
    left = set(after.pending)
    return [position for position in looked_at if position not in left]


def _placed(
    source: Source, batch: Batch, positions: list[int], first_number: int
) -> Iterator[PlacedSample | UnusedSample]:
    """Find the samples of some positions in their batch, by their source and key."""
    waiting: dict[tuple[str, str], deque[tuple[int, SampleView]]] = defaultdict(deque)
    unused: list[tuple[int, SkippedView]] = []
    for position, view in zip(positions, source.views(positions), strict=True):
        if isinstance(view, SampleView):
            waiting[view.source, view.sample.key].append((position, view))
        else:
            unused.append((position, view))
    length = batch.tokens.shape[1]
    filled = batch.row_lengths.tolist()
    bounds = batch.cu_seqlens.tolist()
    keys = iter(batch.keys)
    first_tile = 0
    found: list[PlacedSample | UnusedSample] = []
    for begin, end, index in zip(bounds[:-1], bounds[1:], batch.sources.tolist(), strict=True):
        row, start = divmod(begin, length)
        if not filled[row]:
            continue
        position, view = waiting[source.names[index], next(keys)].popleft()
        stop = min(end - row * length, filled[row])
        found.append(PlacedSample(0, position, view, row, start, stop, first_tile))
        first_tile += view.sample.tiles.shape[0]
    found += [UnusedSample(0, position, view) for position, view in unused]
    if not source.is_packed:
        found.sort(key=lambda one: one.position)
    for number, one in enumerate(found, start=first_number):
        yield replace(one, number=number)
