"""What runs in the loaders' worker processes: rows of a data set become batches, or are measured."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from megavlm.batch import Batch, SkippedSample
from megavlm.data.blend import source_of
from megavlm.data.collate import pack
from megavlm.data.conversation import Conversation
from megavlm.data.datasets import Dataset
from megavlm.data.processor import SampleProcessor
from megavlm.data.sample import Sample, SampleError
from megavlm.runtime.signals import deaf_children, hear_parent_only

NO_SAMPLE = -1
"""A row number that stands for no sample: beyond the end of a single pass."""

T = TypeVar("T")


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """Makes a micro-batch: given the row numbers of the samples of each of its rows."""

    def __init__(self, dataset: Dataset, processor: SampleProcessor, pad_multiple: int) -> None:
        """Keep them; ``pad_multiple`` as of :func:`megavlm.data.collate.pack`."""
        self._dataset = dataset
        self._processor = processor
        self._pad_multiple = pad_multiple

    def __getitem__(self, rows: list[list[int]]) -> Batch:
        return pack(
            [[self._load(number) for number in row if number != NO_SAMPLE] for row in rows],
            pad_id=self._processor.tokenizer.pad_id,
            tile_size=self._processor.tile_size,
            pad_multiple=self._pad_multiple,
            uses_context=self._processor.route.uses_context,
        )

    def _load(self, row: int) -> Sample | SkippedSample:
        found = _read(self._dataset, row)
        if isinstance(found, SkippedSample):
            return found
        try:
            sample = self._processor(*found)
        except SampleError as error:
            return error.skipped
        sample.source = source_of(self._dataset, row)
        return sample


class Measures(torch.utils.data.Dataset[list[tuple[int, int]]]):
    """Says how many tokens and tiles samples have; ``(0, 0)`` of one that cannot be used. Reads no pixels."""

    def __init__(self, dataset: Dataset, processor: SampleProcessor) -> None:
        """Keep both."""
        self._dataset = dataset
        self._processor = processor

    def __getitem__(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        return [self._measure(row) for row in rows]

    def _measure(self, row: int) -> tuple[int, int]:
        found = _read(self._dataset, row)
        if isinstance(found, SkippedSample):
            return (0, 0)
        try:
            return self._processor.measure(*found)
        except SampleError:
            return (0, 0)  # reported where its pixels would be read


def _read(dataset: Dataset, row: int) -> tuple[str, Conversation] | SkippedSample:
    try:
        return dataset[row]
    except ValueError as error:  # the file was changed while training
        return SkippedSample(f"row {row}", "row_malformed", str(error))


def start_loading(
    work: torch.utils.data.Dataset[Any], requests: Any, *, num_workers: int, timeout_seconds: int
) -> torch.utils.data.DataLoader[Any]:
    """Make what hands requests to workers and gives their answers in order.

    Args:
        work: what they do.
        requests: iterated in this process, some steps ahead.
        num_workers: processes; 0 works in this process.
        timeout_seconds: a worker that gives nothing for so long is an error.
    """
    return _QuietlyStarted(
        work,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        timeout=timeout_seconds if num_workers else 0,
        worker_init_fn=_start_worker,
        # A generator of its own: the default would draw from torch's and so change what the model draws.
        generator=torch.Generator().manual_seed(0),
    )


class _QuietlyStarted(torch.utils.data.DataLoader[Any]):
    """Starts its workers deaf: a signal may come before a worker has got as far as to say what it listens to."""

    def __iter__(self) -> Any:
        with deaf_children():
            return super().__iter__()


def next_answer(answers: Iterator[T], num_workers: int) -> T:
    """Return the next answer.

    Raises:
        RuntimeError: a worker died or gave nothing in time.
    """
    try:
        return next(answers)
    except (EOFError, OSError) as error:
        if not num_workers:
            raise
        # The worker died between announcing its answer and handing over the memory that holds it.
        raise RuntimeError(
            f"data.num_workers={num_workers}: a worker exited unexpectedly ({type(error).__name__}). "
            "Look for the system's out-of-memory killer."
        ) from error


def check_sizes(
    micro_batch_size: int, global_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> None:
    """Check that a step can be dealt to ranks and micro-batches.

    Raises:
        ValueError: the sizes do not divide, or a number is out of range.
    """
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
    hear_parent_only()
