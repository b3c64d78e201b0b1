"""Gives each data-parallel rank its micro-batches of packed rows, in an order that no layout changes."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping

from megavlm.batch import Batch
from megavlm.data.blend import order_of
from megavlm.data.datasets import Dataset
from megavlm.data.order import Order
from megavlm.data.packing import Candidate, PackingConfig, RowPacker
from megavlm.data.processor import SampleProcessor
from megavlm.data.progress import LaneProgress, Progress
from megavlm.data.worker import Measures, MicroBatches, check_sizes, next_answer, start_loading

# Samples that a worker measures at once.
_NUM_MEASURED = 16


class PackedLoader:
    """Iterates over steps without end; each gives this data-parallel rank's micro-batches.

    The sequence of samples is dealt to as many lanes as a step has micro-batches, and each lane packs its samples by
    itself (:class:`megavlm.data.packing.RowPacker`). What a row holds depends on the data, the seed, the number of
    micro-batches of a step and the rows before; not on ranks or workers: rank ``r`` of ``n`` has the lanes ``r``,
    ``r + n`` and so on. Lengths are measured ahead, without pixels, by workers of their own.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: SampleProcessor,
        packing: PackingConfig,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        pad_multiple: int = 1,
        progress: Progress | None = None,
        timeout_seconds: int = 300,
    ) -> None:
        """Set the plan; workers start with the first step.

        Args:
            dataset: rows.
            processor: makes samples of rows.
            packing: how rows are filled.
            micro_batch_size: rows in a batch.
            global_batch_size: rows in a step, over all ranks.
            data_parallel_rank, data_parallel_size: which of how many ranks this is.
            seed: of the shuffle.
            shuffle: whether each epoch has an order of its own.
            num_workers: processes that make batches, and half as many that measure; 0 does both in this process.
            pad_multiple: rows are padded to a multiple of it.
            progress: where to begin; None: with the first sample.
            timeout_seconds: a worker that gives nothing for so long is an error.

        Raises:
            ValueError: the sizes do not divide, a number is out of range, or the dataset is empty.
        """
        check_sizes(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
        if len(dataset) == 0:
            raise ValueError("dataset: has 0 rows. Check its path and limit.")
        num_lanes = global_batch_size // micro_batch_size
        dealt = (progress or Progress.after(0)).dealt_to(num_lanes)
        self._num_workers = num_workers
        self._plan = _Plan(
            Measures(dataset, processor),
            order_of(dataset, seed, shuffle),
            packing,
            capacity=processor.config.seq_length,
            rows_per_micro_batch=micro_batch_size,
            lanes={number: dealt.lanes[number] for number in range(data_parallel_rank, num_lanes, data_parallel_size)},
            num_lanes=num_lanes,
            num_workers=-(-num_workers // 2),
            timeout_seconds=timeout_seconds,
        )
        self.lanes: Mapping[int, LaneProgress] = self._plan.lanes
        """This rank's lanes after the steps handed out so far; those of all ranks are the run's progress."""
        self._source = start_loading(
            MicroBatches(dataset, processor, pad_multiple),
            self._plan,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        """Give the micro-batches of one step after the other, from where the loader was left.

        Raises:
            RuntimeError: a worker died or gave nothing for ``timeout_seconds``.
        """
        self._plan.lanes = dict(self.lanes)
        self._plan.after_steps.clear()
        loaded = iter(self._source)
        while True:
            micro_batches = [next_answer(loaded, self._num_workers) for _ in self.lanes]
            self.lanes = self._plan.after_steps.popleft()
            yield micro_batches


class _Plan:
    """Which samples each row holds. Iterated by the DataLoader as its sampler, some steps ahead."""

    def __init__(
        self,
        measures: Measures,
        order: Order,
        packing: PackingConfig,
        *,
        capacity: int,
        rows_per_micro_batch: int,
        lanes: dict[int, LaneProgress],
        num_lanes: int,
        num_workers: int,
        timeout_seconds: int,
    ) -> None:
        self.lanes = lanes
        self.after_steps: deque[dict[int, LaneProgress]] = deque()
        """The lanes after each step that was planned and not handed out yet."""
        self._measures = measures
        self._order = order
        self._packing = packing
        self._capacity = capacity
        self._rows_per_micro_batch = rows_per_micro_batch
        self._num_lanes = num_lanes
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds

    def __iter__(self) -> Iterator[list[list[int]]]:
        lanes = _MeasuredLanes(self)
        packers = {number: RowPacker(lanes.candidates(number), self._packing, self._capacity) for number in self.lanes}
        while True:
            micro_batches = []
            for packer in packers.values():
                rows = [packer.next_row() for _ in range(self._rows_per_micro_batch)]
                micro_batches.append([[self._order.row(sample.position) for sample in row] for row in rows])
            # before the last micro-batch is handed out, as this process may not come back here before it is read
            self.after_steps.append({number: lanes.progress(number, packer) for number, packer in packers.items()})
            yield from micro_batches

    def requests(self) -> Iterator[tuple[int, list[int]]]:
        """Positions of each lane in turn, in pieces to be measured: ``(lane, positions)``."""
        streams = {number: lane.positions(self._num_lanes) for number, lane in self.lanes.items()}
        while True:
            for number, stream in streams.items():
                yield number, list(itertools.islice(stream, _NUM_MEASURED))

    def measured(self) -> Iterator[tuple[int, list[Candidate]]]:
        """The same as candidates for rows."""
        asked: deque[tuple[int, list[int]]] = deque()

        def ask() -> Iterator[list[int]]:
            for number, positions in self.requests():
                asked.append((number, positions))
                yield [self._order.row(position) for position in positions]

        answers = iter(
            start_loading(
                self._measures,
                _Requests(ask()),
                num_workers=self._num_workers,
                timeout_seconds=self._timeout_seconds,
            )
        )
        while True:
            sizes = next_answer(answers, self._num_workers)
            number, positions = asked.popleft()
            yield number, [Candidate(position, *size) for position, size in zip(positions, sizes, strict=True)]

    @property
    def num_lanes(self) -> int:
        """Of all ranks."""
        return self._num_lanes


class _Requests:
    """An iterator as a sampler."""

    def __init__(self, requests: Iterator[list[int]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[list[int]]:
        return self._requests


class _MeasuredLanes:
    """Deals what is measured, lane after lane, to the lane that asks."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._measured = plan.measured()
        self._waiting: dict[int, deque[Candidate]] = {number: deque() for number in plan.lanes}
        self._pending = {number: deque(lane.pending) for number, lane in plan.lanes.items()}
        self._next = {number: lane.next_position for number, lane in plan.lanes.items()}

    def candidates(self, number: int) -> Iterator[Candidate]:
        waiting, pending = self._waiting[number], self._pending[number]
        while True:
            while not waiting:
                lane, candidates = next(self._measured)
                self._waiting[lane].extend(candidates)
            candidate = waiting.popleft()
            if pending:
                pending.popleft()
            else:
                self._next[number] = candidate.position + self._plan.num_lanes
            yield candidate

    def progress(self, number: int, packer: RowPacker) -> LaneProgress:
        """The lane as it is now: what its packer passed over, and what it has not looked at."""
        passed_over = [candidate.position for candidate in packer.buffer]
        return LaneProgress(self._next[number], (*passed_over, *self._pending[number]))
