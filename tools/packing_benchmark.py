"""Trains on samples of mixed lengths: packed, padded, and padded with transformers; compares useful tokens a second.

    python tools/packing_benchmark.py                # the 45.6 M model, minutes
    python tools/packing_benchmark.py --size tiny    # seconds; shows that everything works

Lengths are log-normal (median a quarter of a row), half of the samples begin with an image. A padded micro-batch is as
long as its longest sample; packed rows are filled by the packer that training uses. All sides start from the same
weights and first train on the same samples, where their losses must agree. Each has a process of its own; they take
turns, and ratios are taken turn by turn before the median. The table goes to docs/BENCHMARKS.md.
"""

import argparse
import dataclasses
import itertools
import math
import multiprocessing.connection
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from benchmark_models import Ours, Theirs
from benchmark_size import SIZES, Size
from benchmark_worker import Worker, answer_all, describe_machine, time_steps

from megavlm.batch import Batch
from megavlm.data import Sample, pack
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.expansion import ImageTokens, TileTokens, expand
from megavlm.data.packing import Candidate, PackingConfig, RowPacker
from megavlm.runtime import process

T = TypeVar("T")

PARTS = ("vision", "connector", "language")
SIDES = ("packed", "padded", "transformers")
NUM_STEPS = 4
"""Different ones, taken in turn."""
SPREAD = 0.8
"""Standard deviation of the logarithm of the lengths."""
# Worst of the first losses seen to differ (relative): fp32 below 1e-6, bf16 8e-5.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Work:
    """What the sides train on."""

    size: Size
    mode: str
    num_threads: int
    samples_per_step: int
    micro_batch_size: int
    """Samples of a padded micro-batch, and rows of a packed one."""

    def samples(self) -> list[Sample]:
        """All samples, the same on every side."""
        generator = torch.Generator().manual_seed(1)
        return [make_sample(self.size, generator) for _ in range(NUM_STEPS * self.samples_per_step)]

    def padded(self) -> list[list[Batch]]:
        """Steps of padded micro-batches."""
        steps = cut(self.samples(), self.samples_per_step)
        return [[self._join([[one] for one in some]) for some in cut(step, self.micro_batch_size)] for step in steps]

    def packed(self) -> list[list[Batch]]:
        """The same samples in full rows, in as many steps."""
        rows = pack_rows(self.samples(), self.size.length)
        steps = cut(rows, -(-len(rows) // NUM_STEPS))
        return [[self._join(some) for some in cut(step, self.micro_batch_size)] for step in steps]

    def first_step_packed(self) -> list[list[Batch]]:
        """The samples of the first padded step in full rows."""
        return [[self._join(pack_rows(self.samples()[: self.samples_per_step], self.size.length))]]

    def _join(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return pack(rows, pad_id=0, tile_size=self.size.image_size)


def cut(items: Sequence[T], length: int) -> list[Sequence[T]]:
    """Cut into pieces of a length; the last may be shorter."""
    return [items[start : start + length] for start in range(0, len(items), length)]


def make_sample(size: Size, generator: torch.Generator) -> Sample:
    """Random text, every token trained, behind an image in every other sample."""
    has_image = bool(torch.rand((), generator=generator) < 0.5)
    least = has_image * size.tokens_per_tile + 4
    drawn = math.exp(math.log(size.length / 4) + SPREAD * float(torch.randn((), generator=generator)))
    length = min(size.length, max(least, round(drawn)))
    num_image_tokens = has_image * size.tokens_per_tile
    ids = torch.randint(0, size.image_token, (length - num_image_tokens,), generator=generator).tolist()
    text = TokenRun(tuple(ids), is_trained=True)
    tile = TileTokens((), size.tokens_per_tile)
    runs = [ImageSlot(), text] if has_image else [text]
    expansion = expand(runs, [ImageTokens((tile,))] if has_image else [], size.image_token)
    shape = (int(has_image), 3, size.image_size, size.image_size)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return expansion.with_tiles("made", tiles, [1] * int(has_image))


def pack_rows(samples: Sequence[Sample], capacity: int) -> list[list[Sample]]:
    """Fill rows with the packer of training until every sample has its place."""

    def candidates() -> Iterator[Candidate]:
        for position, sample in enumerate(samples):
            yield Candidate(position, sample.num_tokens, sample.tiles.shape[0])
        for position in itertools.count(len(samples)):  # nothing, that takes no room
            yield Candidate(position, 0, 0)

    packer = RowPacker(candidates(), PackingConfig(), capacity)
    rows: list[list[Sample]] = []
    while sum(map(len, rows)) < len(samples):
        row = [samples[one.position] for one in packer.next_row() if one.position < len(samples)]
        if row:
            rows.append(row)
    return rows


def serve(connection: multiprocessing.connection.Connection, work: Work, side: str) -> None:
    """In a worker: build one side, then do what is asked until the other end is closed."""
    torch.set_num_threads(work.num_threads)
    theirs = Theirs(work.size, work.mode, PARTS, work.padded())
    if side == "transformers":
        answer_all(connection, theirs)
        return
    weights = theirs.initial_weights()
    del theirs
    with process.process(num_threads=work.num_threads):
        steps = work.first_step_packed() if side == "packed" else work.padded()[:1]
        answer_all(connection, Ours(work.size, work.mode, PARTS, steps, weights))


def take_all_steps(side: Ours, steps: Sequence[Sequence[Batch]]) -> None:
    """Let a side of ours go on with other data."""
    side.steps = steps


def first_loss(side: Ours | Theirs) -> float:
    """Loss of one step."""
    return side.step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the three sides and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="shape of the model")
    parser.add_argument("--mode", choices=LOSS_TOLERANCE, default="bf16", help="precision")
    parser.add_argument("--length", type=int, help="tokens of a full row (default: 512, tiny: 48)")
    parser.add_argument("--samples", type=int, default=32, help="samples of a padded step")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    options = parser.parse_args(arguments)
    length = options.length or {"small": 512, "tiny": 48}[options.size]
    size = dataclasses.replace(SIZES[options.size], length=length)
    work = Work(size, options.mode, options.threads, options.samples, options.micro_batch_size)
    print(describe_machine(options.threads))
    workers = {side: Worker(serve, work, side) for side in SIDES}
    try:
        check_losses(work, {side: worker.run(first_loss) for side, worker in workers.items()})
        steps = {"packed": work.packed(), "padded": work.padded()}
        for side, batches in steps.items():
            workers[side].run(take_all_steps, batches)
        seconds = time_in_turn(workers, options.rounds)
    finally:
        for worker in workers.values():
            worker.end()
    print("\n" + "\n".join(table_lines(work, steps, seconds)))


def check_losses(work: Work, losses: dict[str, float]) -> None:
    """Compare the losses on the same samples.

    Raises:
        RuntimeError: the sides do not train the same model on the same tokens.
    """
    print("first losses: " + ", ".join(f"{side} {loss:.6f}" for side, loss in losses.items()))
    wanted = losses["transformers"]
    for side, loss in losses.items():
        if not abs(loss - wanted) <= LOSS_TOLERANCE[work.mode] * abs(wanted):
            raise RuntimeError(f"{side}: loss {loss}, {wanted} with transformers. They do not train the same.")


def time_in_turn(workers: dict[str, Worker], num_rounds: int) -> dict[str, list[float]]:
    """Seconds that each side takes for all steps, once a round; the side that begins changes."""
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(num_rounds):
        for side in (*SIDES[number % 3 :], *SIDES[: number % 3]):
            seconds[side].append(NUM_STEPS * workers[side].run(time_steps, NUM_STEPS))
        print(f"round {number + 1}: " + ", ".join(f"{side} {seconds[side][-1]:.2f} s" for side in SIDES))
    return seconds


def table_lines(work: Work, steps: dict[str, list[list[Batch]]], seconds: dict[str, list[float]]) -> list[str]:
    """The Markdown table."""
    useful = sum(sample.num_tokens for sample in work.samples())
    steps = {**steps, "transformers": steps["padded"]}
    lines = [
        f"{NUM_STEPS * work.samples_per_step} samples, {useful} useful tokens in {NUM_STEPS} steps; rows of up to"
        f" {work.size.length} tokens, {work.micro_batch_size} in a micro-batch; {work.mode}",
        "",
        "| side | useful tokens/s | padding | packed is faster (min to max) |",
        "| --- | --- | --- | --- |",
    ]
    for side in SIDES:
        positions = sum(batch.tokens.numel() for batches in steps[side] for batch in batches)
        ratios = [theirs / packed for theirs, packed in zip(seconds[side], seconds["packed"], strict=True)]
        faster = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if side != "packed" else ""
        rate = useful / statistics.median(seconds[side])
        lines.append(f"| {side} | {rate:.0f} | {1 - useful / positions:.0%} | {faster} |")
    return lines


if __name__ == "__main__":
    main()
