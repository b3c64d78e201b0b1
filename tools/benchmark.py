"""Trains one model twice, with MegaVLM and with transformers, in one process and in turn, and compares the speed.

    python tools/benchmark.py                   # the 45.6 M model on all cores of this machine
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
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers
from benchmark_models import MODES, Ours, Theirs, make_batches
from benchmark_size import SIZES, Size, linear_flops, matmul_shapes, step_flops
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
    results: dict[str, Result] = {}
    for name in options.rows:
        with process.process(num_threads=options.threads):
            results[name] = run_row(name, size, options.trained_share, options.rounds, options.steps)
        gc.collect()
    print("\n" + "\n".join(table_lines(results)))


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
    check_flops(size, trainable, ours, theirs)
    rounds = []
    for number in range(num_rounds):
        # the side that goes first changes, so that neither always inherits the other's caches
        sides = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        seconds = {id(side): time_steps(side.step, num_steps) for side in sides}
        dtype = MODES[mode].dtype
        rates = matmul_rate([(2048, 2048, 2048)], dtype), matmul_rate(matmul_shapes(size), dtype)
        rounds.append(Round(seconds[id(ours)], seconds[id(theirs)], *rates))
        print(f"{name} round {number + 1}: {1e3 * rounds[-1].ours:.0f} and {1e3 * rounds[-1].theirs:.0f} ms a step")
    flops = step_flops(size, trainable, ours.num_trained)
    return Result(rounds, size.num_tokens, flops, measure_device_share(ours.step))


def table_lines(results: Mapping[str, Result]) -> list[str]:
    """The Markdown table."""
    rows = {name: result.cells() for name, result in results.items()}
    titles = ["row", *next(iter(rows.values()))]
    lines = [titles, ["---"] * len(titles), *([name, *cells.values()] for name, cells in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


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


def check_flops(size: Size, trainable: Sequence[str], ours: Ours, theirs: Theirs) -> None:
    """Compare the counted FLOPs of products with weights with those that torch saw.

    Raises:
        RuntimeError: they differ.
    """
    for side, num_logits in ((ours, ours.num_trained), (theirs, size.num_tokens)):
        with FlopCounterMode(display=False) as counter:
            side.step()
        by_operation = counter.get_flop_counts()["Global"]
        seen = sum(flops for operation, flops in by_operation.items() if "bmm" not in str(operation))  # bmm: attention
        counted = linear_flops(size, trainable, num_logits)
        if seen != counted:
            raise RuntimeError(f"{type(side).__name__}: {counted} FLOPs counted from the shapes, {seen} seen by torch.")


def time_steps(step: Callable[[], float], num_steps: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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
    main()
