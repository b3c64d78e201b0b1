"""Gives each data-parallel rank its micro-batches, step by step, in an order that no layout changes."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megavlm.batch import Batch, SkippedSample
from megavlm.data.collate import collate
from megavlm.data.datasets import Dataset
from megavlm.data.order import row_at
from megavlm.data.processor import SampleProcessor
from megavlm.data.sample import Sample, SampleError

# Where a position of the sequence of samples is beyond a single pass.
_NO_SAMPLE = -1


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
            endless: whether epoch follows epoch; otherwise each iteration is one pass from ``consumed_samples`` to the
                end of the dataset, the last step filled with rows that train nothing.
            timeout_seconds: a worker that gives no batch for so long is an error.

        Raises:
            ValueError: the sizes do not divide, a number is out of range, or the dataset is empty.
        """
        _check_sizes(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples={consumed_samples}: is below 0. Give the number from the checkpoint.")
        if len(dataset) == 0:
            raise ValueError("dataset: has 0 rows. Check its path and limit.")
        self.consumed_samples = consumed_samples
        self._first_position = consumed_samples
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
            seed=seed,
            shuffle=shuffle,
            endless=endless,
        )
        self._source = torch.utils.data.DataLoader(
            _MicroBatches(dataset, processor, pad_multiple),
            batch_size=None,
            sampler=self._plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            timeout=timeout_seconds if num_workers else 0,
            worker_init_fn=_start_worker,
            # A generator of its own: the default would draw from torch's and so change what the model draws.
            generator=torch.Generator().manual_seed(seed),
        )

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
            micro_batches = [self._next(loaded) for _ in range(self._num_micro_batches)]
            self.consumed_samples += self._global_batch_size
            yield micro_batches

    def _next(self, loaded: Iterator[Batch]) -> Batch:
        try:
            return next(loaded)
        except (EOFError, OSError) as error:
            if not self._source.num_workers:
                raise
            # The worker died between announcing its batch and handing over the memory that holds it.
            raise RuntimeError(
                f"data.num_workers={self._source.num_workers}: a worker exited unexpectedly ({type(error).__name__}). "
                "Look for the system's out-of-memory killer."
            ) from error


@dataclass
class _Plan:
    """Which rows each micro-batch of this rank holds. Iterated by the DataLoader as its sampler."""

    num_rows: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    num_micro_batches: int
    seed: int
    shuffle: bool
    endless: bool
    first_position: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.data_parallel_size * self.num_micro_batches

    def num_steps(self, first_position: int) -> int:
        return max(0, -(-(self.num_rows - first_position) // self.global_batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        step_start = self.first_position
        while self.endless or step_start < self.num_rows:
            for micro_batch in range(self.num_micro_batches):
                slot = micro_batch * self.data_parallel_size + self.data_parallel_rank
                start = step_start + slot * self.micro_batch_size
                yield [self._row(position) for position in range(start, start + self.micro_batch_size)]
            step_start += self.global_batch_size

    def _row(self, position: int) -> int:
        if not self.endless and position >= self.num_rows:
            return _NO_SAMPLE
        return row_at(position, self.num_rows, self.seed, self.shuffle)


class _MicroBatches(torch.utils.data.Dataset[Batch]):
    """Makes a micro-batch of row numbers; runs in the workers."""

    def __init__(self, dataset: Dataset, processor: SampleProcessor, pad_multiple: int) -> None:
        self._dataset = dataset
        self._processor = processor
        self._pad_multiple = pad_multiple

    def __getitem__(self, rows: list[int]) -> Batch:
        samples = [None if row == _NO_SAMPLE else self._load(row) for row in rows]
        return collate(
            samples,
            pad_id=self._processor.tokenizer.pad_id,
            tile_size=self._processor.tile_size,
            pad_multiple=self._pad_multiple,
            uses_context=self._processor.route.uses_context,
        )

    def _load(self, row: int) -> Sample | SkippedSample:
        try:
            key, conversation = self._dataset[row]
        except ValueError as error:  # the file was changed while training
            return SkippedSample(f"row {row}", "row_malformed", str(error))
        try:
            return self._processor(key, conversation)
        except SampleError as error:
            return error.skipped


def _check_sizes(
    micro_batch_size: int, global_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> None:
    if micro_batch_size < 1 or global_batch_size < 1 or data_parallel_size < 1:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}, global_batch_size={global_batch_size}, "
            f"data_parallel_size={data_parallel_size}: must all be 1 or more."
        )
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(
            f"data_parallel_rank={data_parallel_rank}: must be from 0 to data_parallel_size - 1 = "
            f"{data_parallel_size - 1}."
        )
    samples_at_once = micro_batch_size * data_parallel_size
    if global_batch_size % samples_at_once:
        raise ValueError(
            f"global_batch_size={global_batch_size}: is not a multiple of micro_batch_size x data parallel size = "
            f"{micro_batch_size} x {data_parallel_size} = {samples_at_once}. "
            f"The nearest multiples are {global_batch_size // samples_at_once * samples_at_once} and "
            f"{(global_batch_size // samples_at_once + 1) * samples_at_once}."
        )


def _start_worker(worker_id: int) -> None:
    """Keep a worker to one thread, and deaf to the signals that ask the training process to save or stop."""
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
