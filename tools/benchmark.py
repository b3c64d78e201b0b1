"""Trains one model twice, with MegaVLM and with transformers, in one process and in turn, and compares the speed.

    python tools/benchmark.py                   # the 45.7 M model on all cores of this machine
    python tools/benchmark.py --size tiny       # seconds; shows that everything works

Both sides start from the same weights (through megavlm.convert), see the same batches, clip the gradient norm at 1 and
use a fused AdamW. Theirs is InternVLForConditionalGeneration with SDPA attention. Groups of steps alternate, so that a
machine that gets slower slows both, and the ratio of each pair of groups is taken before the median. Losses of both are
compared first: the speed of another model would mean nothing. The table goes to docs/BENCHMARKS.md.
"""

import argparse
import cProfile
import dataclasses
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from benchmark_models import MODES, SIZES, Ours, Size, Theirs, linear_flops, make_batches, step_flops
from torch.utils.flop_counter import FlopCounterMode

import megavlm
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

# Worst first losses seen to differ: fp32 3e-7, bf16 2e-3 (relative): other rounding.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "bf16_pure": 2e-2}


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of one step, and the matmul rate (FLOP/s) beside it."""

    ours: float
    theirs: float
    matmul_rate: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What one row of the table came to."""

    rounds: list[Round]
    tokens: int
    flops: float
    device_share: float

    def median(self, value: Callable[[Round], float]) -> float:
        """Median of something over the rounds."""
        return statistics.median(value(entry) for entry in self.rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="shape of the model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="precisions and frozen parts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of groups")
    parser.add_argument("--steps", type=int, default=3, help="steps of a group")
    parser.add_argument("--trained-share", type=float, default=1.0, help="share of the text tokens that have a loss")
    options = parser.parse_args(arguments)
    print(describe_machine(options.threads))
    size = SIZES[options.size]
    table = ["| row | tokens/s MegaVLM | tokens/s transformers | ratio (min to max) | step ms | matmul rate | share | device module |"]
    table.append("|---|---|---|---|---|---|---|---|")
    for name in options.rows:
        with process.process(num_threads=options.threads):
            result = run_row(name, size, options.trained_share, options.rounds, options.steps)
        table.append(table_line(name, result))
        gc.collect()
    print("\n" + "\n".join(table))


def describe_machine(num_threads: int) -> str:
    """Say what was measured, on what."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"MegaVLM {megavlm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, Python"
        f" {platform.python_version()}; {num_threads} threads of {os.cpu_count()} cores, load {load:.1f};"
        f" {torch.backends.cpu.get_cpu_capability()}"
    )


def run_row(name: str, size: Size, trained_share: float, num_rounds: int, num_steps: int) -> Result:
    """Build both sides, check that they are the same model, and time them in turn."""
    mode, trainable = ROWS[name]
    batches = make_batches(size, trained_share)
    theirs = Theirs(size, mode, trainable, batches)
    ours = Ours(size, mode, trainable, batches, theirs.initial_weights())
    check_losses(name, mode, ours, theirs)
    check_flops(name, size, trainable, ours, theirs)
    rounds = []
    for number in range(num_rounds):
        # the side that goes first changes, so that neither always inherits the other's caches
        sides = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        seconds = {id(side): time_steps(side.step, num_steps) for side in sides}
        rounds.append(Round(seconds[id(ours)], seconds[id(theirs)], measure_matmul_rate(MODES[mode].dtype)))
        print(f"{name} round {number + 1}: {1e3 * rounds[-1].ours:.0f} and {1e3 * rounds[-1].theirs:.0f} ms a step")
    return Result(rounds, size.num_tokens, step_flops(size, trainable, ours.num_trained), measure_device_share(ours.step))


def table_line(name: str, result: Result) -> str:
    """One line of the Markdown table."""
    ratios = [entry.theirs / entry.ours for entry in result.rounds]
    return (
        f"| {name} | {result.tokens / result.median(lambda r: r.ours):.0f}"
        f" | {result.tokens / result.median(lambda r: r.theirs):.0f}"
        f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        f" | {1e3 * result.median(lambda r: r.ours):.0f} and {1e3 * result.median(lambda r: r.theirs):.0f}"
        f" | {1e-9 * result.median(lambda r: r.matmul_rate):.0f} GFLOP/s"
        f" | {result.median(lambda r: result.flops / r.ours / r.matmul_rate):.0%} | {result.device_share:.1%} |"
    )


def check_losses(name: str, mode: str, ours: Ours, theirs: Theirs, num_steps: int = 3) -> None:
    """Take the first steps (which also warm up) and compare.

    Raises:
        RuntimeError: the sides do not train the same model.
    """
    pairs = [(ours.step(), theirs.step()) for _ in range(num_steps)]
    print(f"{name} first losses: " + ", ".join(f"{a:.6f} and {b:.6f}" for a, b in pairs))
    for a, b in pairs:
        if not abs(a - b) <= LOSS_TOLERANCE[mode] * abs(b):
            raise RuntimeError(f"{name}: loss {a} here, {b} with transformers. They do not train the same model.")


def check_flops(name: str, size: Size, trainable: Sequence[str], ours: Ours, theirs: Theirs) -> None:
    """Compare the counted FLOPs of matrix products with what torch saw.

    Raises:
        RuntimeError: they differ by more than 1 %.
    """
    for side, positions in ((ours, ours.num_trained), (theirs, size.num_tokens)):
        with FlopCounterMode(display=False) as counter:
            side.step()
        counted = linear_flops(size, trainable, positions)
        print(f"{name} {type(side).__name__}: {counted / 1e9:.2f} GFLOP counted, {counter.get_total_flops() / 1e9:.2f} seen")


def time_steps(step: Callable[[], float], num_steps: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_matmul_rate(dtype: torch.dtype, side: int = 2048, repeats: int = 5) -> float:
    """Best FLOP/s of a square matrix product."""
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def measure_device_share(step: Callable[[], float]) -> float:
    """Share of a step spent in the functions of the CPU device module, callees not counted.

    The profiler's own cost is in it, so this is an upper bound.
    """
    profiler = cProfile.Profile()
    start = time.perf_counter()
    profiler.runcall(step)
    whole = time.perf_counter() - start
    own = [
        entry.inlinetime
        for entry in profiler.getstats()
        if getattr(entry.code, "co_filename", None) == cpu_device.__file__
    ]
    return sum(own) / whole


if __name__ == "__main__":
    sys.exit(main())
