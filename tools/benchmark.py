"""Trains one model twice, with MegaVLM and with transformers, in turn, and compares the speed.

    python tools/benchmark.py                   # the 45.6 M model on all cores of this machine
    python tools/benchmark.py --size tiny       # seconds; shows that everything works

Both sides start from the same weights (through megavlm.convert), see the same batches, clip the gradient norm at 1 and
use a fused AdamW. Theirs is InternVLForConditionalGeneration with SDPA attention. Each has a process of its own, as its
users have, because memory that one frees would serve the other. The processes take turns, so that a machine that gets
slower slows both, and the ratio of each pair of turns is taken before the median. Losses of both are compared first:
the speed of another model would mean nothing. The table goes to docs/BENCHMARKS.md.
"""

import argparse
import cProfile
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from benchmark_models import MODES, Ours, Side, Theirs, make_batches
from benchmark_size import SIZES, Size, linear_flops, matmul_shapes, step_flops
from benchmark_worker import Worker, answer_all, describe_machine, time_steps
from torch.utils.flop_counter import FlopCounterMode

from megavlm.runtime import cpu_device, process

EVERYTHING = ("vision", "connector", "language")
STAGE_2 = ("connector", "language")
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp32": ("fp32", EVERYTHING),
    "bf16": ("bf16", EVERYTHING),
    "bf16_pure": ("bf16_pure", EVERYTHING),
    "fp32_stage2": ("fp32", STAGE_2),
    "bf16_stage2": ("bf16", STAGE_2),
}
"""Row of the table -> precision (see ``benchmark_models.MODES``) and the parts that train."""

# Worst of the first losses seen to differ (relative): fp32 1.1e-6, bf16 3e-4. They round otherwise: under autocast the
# residual stream of transformers stays float32, ours is bfloat16 as megatron-core has it.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3, "bf16_pure": 3e-3}


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of one step, and matmul rates (FLOP/s) beside it."""

    ours: float
    theirs: float
    square_rate: float
    shapes_rate: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What one row of the table came to."""

    rounds: list[Round]
    tokens: int
    flops: int
    device_share: float

    def median(self, value: Callable[[Round], float]) -> float:
        """Median of something over the rounds."""
        return statistics.median(value(entry) for entry in self.rounds)

    def cells(self) -> dict[str, str]:
        """The row of the table."""
        ratios = [entry.theirs / entry.ours for entry in self.rounds]
        return {
            "tokens/s MegaVLM": f"{self.median(lambda r: self.tokens / r.ours):.0f}",
            "tokens/s transformers": f"{self.median(lambda r: self.tokens / r.theirs):.0f}",
            "ratio (min to max)": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "ms a step": f"{1e3 * self.median(lambda r: r.ours):.0f} / {1e3 * self.median(lambda r: r.theirs):.0f}",
            "GFLOP": f"{self.flops / 1e9:.0f}",
            "matmul GFLOP/s: square / these shapes": f"{self.median(lambda r: r.square_rate) / 1e9:.0f}"
            f" / {self.median(lambda r: r.shapes_rate) / 1e9:.0f}",
            "share of square rate": f"{self.median(lambda r: self.flops / r.ours / r.square_rate):.0%}",
            "CPU device module": f"{self.device_share:.2%}",
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """What both sides of a row of the table are built from."""

    size: Size
    mode: str
    trainable: tuple[str, ...]
    trained_share: float
    num_threads: int


def serve(connection: multiprocessing.connection.Connection, row: Row, side: str) -> None:
    """In a worker: build one side, then do what is asked until the other end is closed."""
    steps = [[batch] for batch in make_batches(row.size, row.trained_share)]
    torch.set_num_threads(row.num_threads)
    theirs = Theirs(row.size, row.mode, row.trainable, steps)
    if side == "transformers":
        answer_all(connection, theirs)
        return
    weights = theirs.initial_weights()
    del theirs
    with process.process(num_threads=row.num_threads):
        answer_all(connection, Ours(row.size, row.mode, row.trainable, steps, weights))


@contextmanager
def start_sides(row: Row) -> Iterator[tuple[Worker, Worker]]:
    """Start MegaVLM's and transformers' process; end them with the block."""
    workers = Worker(serve, row, "MegaVLM"), Worker(serve, row, "transformers")
    try:
        yield workers
    finally:
        for worker in workers:
            worker.end()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="shape of the model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="precisions and frozen parts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of turns")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--trained-share", type=float, default=1.0, help="share of the text tokens that have a loss")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(describe_machine(options.threads))
    results: dict[str, Result] = {}
    for name in options.rows:
        row = Row(SIZES[options.size], *ROWS[name], options.trained_share, options.threads)
        with start_sides(row) as (ours, theirs):
            results[name] = run_row(name, row, ours, theirs, options.rounds, options.steps)
    print("\n" + "\n".join(table_lines(results)))


def run_row(name: str, row: Row, ours: Worker, theirs: Worker, num_rounds: int, num_steps: int) -> Result:
    """Check that both sides are the same model, and time them in turn."""
    num_trained = int(make_batches(row.size, row.trained_share, count=1)[0].loss_mask.sum())
    check_losses(name, row.mode, ours, theirs)
    check_flops(row, ours, num_logits=num_trained)
    check_flops(row, theirs, num_logits=row.size.num_tokens)
    rounds = []
    for number in range(num_rounds):
        # the side that goes first changes, so that neither always comes after a rest
        workers = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        seconds = {worker: worker.run(time_steps, num_steps) for worker in workers}
        dtype = MODES[row.mode].dtype
        rates = matmul_rate([(2048, 2048, 2048)], dtype), matmul_rate(matmul_shapes(row.size), dtype)
        rounds.append(Round(seconds[ours], seconds[theirs], *rates))
        print(f"{name} round {number + 1}: {1e3 * seconds[ours]:.0f} and {1e3 * seconds[theirs]:.0f} ms a step")
    flops = step_flops(row.size, row.trainable, num_trained)
    return Result(rounds, row.size.num_tokens, flops, ours.run(measure_device_share))


def table_lines(results: Mapping[str, Result]) -> list[str]:
    """The Markdown table."""
    rows = {name: result.cells() for name, result in results.items()}
    titles = ["row", *next(iter(rows.values()))]
    lines = [titles, ["---"] * len(titles), *([name, *cells.values()] for name, cells in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def check_losses(name: str, mode: str, ours: Worker, theirs: Worker, num_steps: int = 3) -> None:
    """Take the first steps (which also warm up) and compare.

    Raises:
        RuntimeError: the sides do not train the same model.
    """
    pairs = list(zip(ours.run(take_steps, num_steps), theirs.run(take_steps, num_steps), strict=True))
    print(f"{name} first losses: " + ", ".join(f"{a:.6f} and {b:.6f}" for a, b in pairs))
    for a, b in pairs:
        if not abs(a - b) <= LOSS_TOLERANCE[mode] * abs(b):
            raise RuntimeError(f"{name}: loss {a} here, {b} with transformers. They do not train the same model.")


def check_flops(row: Row, worker: Worker, num_logits: int) -> None:
    """Compare the counted FLOPs of products with weights with those that torch saw.

    Raises:
        RuntimeError: they differ.
    """
    counted, seen = linear_flops(row.size, row.trainable, num_logits), worker.run(see_flops)
    if seen != counted:
        raise RuntimeError(f"{counted} FLOPs counted from the shapes, {seen} seen by torch.")


def take_steps(side: Side, num_steps: int) -> list[float]:
    """Losses of some steps."""
    return [side.step() for _ in range(num_steps)]


def see_flops(side: Side) -> int:
    """FLOPs of products with weights that torch counts in a step."""
    with FlopCounterMode(display=False) as counter:
        side.step()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in by_operation.items() if "bmm" not in str(operation))  # bmm: attention


def matmul_rate(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP/s of some matrix products together, each ``[rows, inner] @ [inner, columns]``; the best of some repeats."""
    factors = [(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t()) for m, k, n in shapes]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for left, right in factors:
            left @ right
        seconds.append(time.perf_counter() - start)
    return sum(2 * m * k * n for m, k, n in shapes) / min(seconds)


def measure_device_share(side: Side) -> float:
    """Share of a step spent in the functions of the CPU device module, callees not counted.

    The profiler's own cost is in it, so this is an upper bound.
    """
    profiler = cProfile.Profile()
    start = time.perf_counter()
    profiler.runcall(side.step)
    whole = time.perf_counter() - start
    own = [
        entry.inlinetime
        for entry in profiler.getstats()
        if getattr(entry.code, "co_filename", None) == cpu_device.__file__
    ]
    return sum(own) / whole


if __name__ == "__main__":
    main()
