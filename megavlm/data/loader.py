"""Gives each data-parallel rank its micro-batches, step by step, in an order that no layout changes."""

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.batch import Batch
from megavlm.data.blend import order_of
from megavlm.data.datasets import Dataset
from megavlm.data.order import EpochOrder, Order
from megavlm.data.processor import SampleProcessor
from megavlm.data.progress import LaneProgress, Progress
from megavlm.data.worker import NO_SAMPLE, MicroBatches, check_sizes, next_answer, start_loading


class Loader:
    """Iterates over steps; each gives this data-parallel rank's micro-batches.

    Which samples a step uses depends on the seed, the dataset's length, ``global_batch_size`` and the samples consumed
    before, and on nothing else: not on ranks, workers or micro-batches. Within a step, micro-batch ``k`` of rank ``r``
    holds the samples ``(k * data_parallel_size + r) * micro_batch_size`` and following of the global batch.
    """

    consumed_samples: int
    """Samples of all ranks in the steps handed out so far: all that must be saved to go on exactly here."""

    def __init__(
        self,
        dataset: Dataset,
        processor: SampleProcessor,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        pad_multiple: int = 1,
        consumed_samples: int = 0,
        progress: Progress | None = None,
        endless: bool = True,
        timeout_seconds: int = 300,
    ) -> None:
        """Set the plan; workers start with the first step.

        Args:
            dataset: rows.
            processor: makes samples of rows.
            micro_batch_size: samples in a batch.
            global_batch_size: samples in a step, over all ranks.
            data_parallel_rank, data_parallel_size: which of how many ranks this is.
            seed: of the shuffle.
            shuffle: whether each epoch has an order of its own.
            num_workers: processes that make batches; 0 makes them in this process.
            pad_multiple: rows are padded to a multiple of it; the sequence length makes all batches equally wide.
            consumed_samples: where to begin, counted from the first sample of the first epoch.
            progress: where to begin, of a run that may have packed its samples; wins over ``consumed_samples``.
            endless: whether epoch follows epoch; otherwise each iteration is one pass from ``consumed_samples`` to the
                end of the dataset, the last step filled with rows that train nothing.
            timeout_seconds: a worker that gives no batch for so long is an error.

        Raises:
            ValueError: the sizes do not divide, a number is out of range, or the dataset is empty.
        """
        check_sizes(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples={consumed_samples}: is below 0. Give the number from the checkpoint.")
        if len(dataset) == 0:
            raise ValueError("dataset: has 0 rows. Check its path and limit.")
        [start] = (progress or Progress.after(consumed_samples)).dealt_to(1).lanes
        self.consumed_samples = start.num_used
        self._first_position = start.num_used
        self._endless = endless
        self._num_rows = len(dataset)
        self._global_batch_size = global_batch_size
        self._num_micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)
        self._plan = _Plan(
            num_rows=len(dataset),
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            num_micro_batches=self._num_micro_batches,
            order=order_of(dataset, seed, shuffle) if endless else EpochOrder(len(dataset), seed, shuffle),
            endless=endless,
            start=start,
            first_position=start.num_used,
        )
        self._num_workers = num_workers
        self._source = start_loading(
            MicroBatches(dataset, processor, pad_multiple),
            self._plan,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
        )

    @property
    def lanes(self) -> dict[int, LaneProgress]:
        """The only lane after the steps handed out so far: the run's progress, the same on every rank."""
        return {0: self._plan.start.after(self.consumed_samples)}

    def __len__(self) -> int:
        """Steps of one pass from where the loader began.

        Raises:
            TypeError: the loader is endless.
        """
        if self._endless:
            raise TypeError("this loader is endless and has no length")
        return self._plan.num_steps(self._first_position)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Give the micro-batches of one step after the other.

        An endless loader goes on from ``consumed_samples``; one that is not begins its pass anew.

        Raises:
            RuntimeError: a worker died or gave nothing for ``timeout_seconds``.
        """
        if not self._endless:
            self.consumed_samples = self._first_position
        self._plan.first_position = self.consumed_samples
        loaded = iter(self._source)
        while self._endless or self.consumed_samples < self._num_rows:
            micro_batches = [next_answer(loaded, self._num_workers) for _ in range(self._num_micro_batches)]
            self.consumed_samples += self._global_batch_size
            yield micro_batches


@dataclass
class _Plan:
    """Which row of the data each row of this rank's micro-batches holds. Iterated by the DataLoader as its sampler."""

    num_rows: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    num_micro_batches: int
    order: Order
    endless: bool
    start: LaneProgress
    first_position: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.data_parallel_size * self.num_micro_batches

    def num_steps(self, first_position: int) -> int:
        return max(0, -(-(self.num_rows - first_position) // self.global_batch_size))

    def __iter__(self) -> Iterator[list[list[int]]]:
        step_start = self.first_position
        while self.endless or step_start < self.num_rows:
            for micro_batch in range(self.num_micro_batches):
                slot = micro_batch * self.data_parallel_size + self.data_parallel_rank
                start = step_start + slot * self.micro_batch_size
                yield [[self._row(number)] for number in range(start, start + self.micro_batch_size)]
            step_start += self.global_batch_size

    def _row(self, number: int) -> int:
        """The row that is used as ``number``-th; a single pass takes the rows as the order has them."""
        if not self.endless:
            return NO_SAMPLE if number >= self.num_rows else self.order.row(number)
        return self.order.row(self.start.position_of(number))
