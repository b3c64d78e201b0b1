"""Trains a recipe for some steps, to see what they cost: its data, its engine, its optimizer, fresh weights."""

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megavlm.batch import Batch
from megavlm.benchmark.breakdown import DATA_WAIT
from megavlm.benchmark.memory import read_memory
from megavlm.benchmark.timeline import OTHER, Timeline
from megavlm.benchmark.useful import COUNTED, count_batch, row_lengths
from megavlm.build import build_parts
from megavlm.engines.feed import Feed, is_reader
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import PARTS
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.runtime.process import Process
from megavlm.training.feeding import build_training_loader, training_steps
from megavlm.training.prepare_model import make_trainable
from megavlm.training.schedule import build_schedule


@dataclass(frozen=True)
class Work:
    """What is in the micro-batches of a step. Travels between ranks as plain numbers."""

    samples: int = 0
    """Those that gave a row; skipped ones do not count."""
    tokens: int = 0
    """Positions of the decoder that are not padding."""
    positions: int = 0
    """All positions of the decoder."""
    tiles: int = 0
    flops_of: tuple[int, ...] = (0,) * len(COUNTED)
    """Operations of both passes, by :data:`COUNTED`, padding of the batches included."""
    useful_flops_of: tuple[int, ...] = (0,) * len(COUNTED)
    """The part of them that is not spent on padding."""

    @property
    def flops(self) -> int:
        """Of all parts."""
        return sum(self.flops_of[: len(PARTS)])

    @property
    def useful_flops(self) -> int:
        """Of all parts."""
        return sum(self.useful_flops_of[: len(PARTS)])

    def numbers(self) -> list[float]:
        """For :meth:`from_numbers`. Exact up to 2^53."""
        return [self.samples, self.tokens, self.positions, self.tiles, *self.flops_of, *self.useful_flops_of]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "Work":
        """Read what another rank counted, or the sum over ranks."""
        whole = [round(number) for number in numbers]
        middle = 4 + len(COUNTED)
        samples, tokens, positions, tiles = whole[:4]
        return cls(samples, tokens, positions, tiles, tuple(whole[4:middle]), tuple(whole[middle:]))


NUMBERS_OF_WORK = len(Work().numbers())
"""How many :meth:`Work.numbers` gives."""


@dataclass(frozen=True)
class TimedStep:
    """One step on this rank."""

    seconds: float
    """The wait for its data included."""
    data_wait_seconds: float
    work: Work
    """Of this rank's replica, counted by its reader; nothing on other ranks."""
    label_seconds: Counter[str] = field(default_factory=Counter)
    """What the seconds went to, if a timeline was given."""


class Trial:
    """A recipe that is built and can be stepped. All ranks make it and step it together.

    ``checkpoint.pretrained_checkpoint`` is not read, because values of weights cost nothing; ``checkpoint.save`` is not
    touched.
    """

    def __init__(self, recipe: Recipe, process: Process) -> None:
        """Build everything. The default process group must exist.

        Raises:
            ValueError: something in the recipe or its data does not fit.
        """
        self.parts = build_parts(recipe, world_size=process.world_size)
        self.engine = self.parts.engine
        loader = build_training_loader(self.parts, recipe.data.train.build()) if is_reader() else None
        self.memory_before_model_bytes = read_memory(process.device).now
        chunks = self.parts.build_chunks()
        initialize_weights(chunks, recipe.training.seed)
        make_trainable(self.parts, chunks)
        self._feed = Feed(training_steps(self.parts, loader) if loader is not None else None)
        self._schedule = build_schedule(
            self.engine.optimizer, recipe.training.optimizer, train_iters=recipe.training.train_iters, iteration=0
        )
        self._num_steps = 0

    def step(self, timeline: Timeline | None = None) -> TimedStep:
        """Train one step and wait for the device.

        Args:
            timeline: started and stopped here; gets the labels ``data_wait`` and ``other``.
        """
        start = time.perf_counter()
        if timeline is not None:
            timeline.start()
        with timeline.during(DATA_WAIT) if timeline else contextlib.nullcontext():
            batches = next(self._feed)
        data_wait_seconds = time.perf_counter() - start
        self._schedule.step(increment=1)
        with timeline.during(OTHER) if timeline else contextlib.nullcontext():
            result = self.engine.train_step(batches)
        self.wait()
        label_seconds = timeline.stop() if timeline is not None else Counter()
        seconds = time.perf_counter() - start
        self._num_steps += 1
        if result.skip_reason is not None:
            LOGGER.warning("step %d did not update the weights: %s", self._num_steps, result.skip_reason)
        return TimedStep(seconds, data_wait_seconds, self._count(batches), label_seconds)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)

    def _count(self, batches: Sequence[Batch]) -> Work:
        """What a replica's micro-batches hold. Only its reader has the tiles; other ranks count nothing."""
        if not is_reader():
            return Work()
        samples = tokens = positions = tiles = 0
        flops: Counter[str] = Counter()
        useful: Counter[str] = Counter()
        for batch in batches:
            lengths = row_lengths(batch)
            samples += batch.cu_seqlens.numel() - 1 - lengths.count(0)
            tokens += sum(lengths)
            positions += batch.tokens.numel()
            tiles += batch.tiles.shape[0]
            of_batch = count_batch(self.parts.recipe, batch, self.parts.tokenizer.vocab_size)
            flops.update(of_batch[0])
            useful.update(of_batch[1])
        by_part = (tuple(counts[part] for part in COUNTED) for counts in (flops, useful))
        return Work(samples, tokens, positions, tiles, *by_part)
