"""Trains the quickstart in bfloat16 and in emulated FP8, and compares losses and held-out scores.

    python examples/quickstart/build_data.py --out data/quickstart
    python tools/fp8_curve.py --out runs/fp8                              # the whole quickstart, six times
    python tools/fp8_curve.py --out runs/fp8 --train-iters 300 700        # a shorter one

All runs see the same data in the same order and start from the same weights, one process and one micro-batch a step.
``fp32`` is among them to show what rounding to bfloat16 alone does. A run that is there already is taken as it is, and
one that was stopped goes on. Writes ``OUT/fp8_curve.json`` and ``OUT/fp8_curve.png``; exits with 1 if a held-out score
is further below bfloat16's than the margin.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")  # no screen needed

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
EMULATED = ("engine.backend=fp8_emulation", "engine.precision=fp8")
RUNS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    **{name: (*EMULATED, f"engine.fp8.recipe={name}") for name in ("delayed", "tensorwise", "blockwise", "mxfp8")},
    "fp32": ("engine.precision=fp32",),
}
"""Name of a run -> its overrides. The others are compared with the first."""
BATCH_SIZES = (32, 16)
MARGIN = 0.05
"""Held-out score that a run may be below bfloat16's. Two standard errors of the difference of two scores of 500
questions, at a score of 0.8."""
SMOOTHED_OVER = 50
_COLOURS = dict(zip(RUNS, ("black", "tab:red", "tab:blue", "tab:green", "tab:orange", "tab:gray"), strict=True))


@dataclass(frozen=True)
class Result:
    """What one run gave."""

    score: float
    """Share of the held-out questions answered exactly."""
    num_questions: int
    validation_loss: float
    """On the held-out questions after the last step; of FP8 runs in FP8."""
    losses: tuple[tuple[float, ...], ...]
    """Training loss of each step of each stage."""
    cpu_seconds: float | None
    """Processor time of the training; None where it was there already."""

    @property
    def last_loss(self) -> float:
        """Mean training loss of the last steps."""
        return float(np.mean(self.losses[-1][-SMOOTHED_OVER:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="what build_data.py wrote")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: all")
    parser.add_argument("--train-iters", type=int, nargs=2, metavar="STEPS", help="of both stages (default: theirs)")
    options = parser.parse_args(arguments)
    names = sorted({next(iter(RUNS)), *options.runs}, key=list(RUNS).index)
    results = {}
    for name in names:
        cpu_seconds = train(name, options.out / name, options.data, options.train_iters)
        results[name] = read(options.out / name, cpu_seconds)
        print(table(results), flush=True)
    write(options.out, results)
    return int(any(score_lost(results, name) > MARGIN for name in results))


def train(name: str, folder: Path, data: Path, train_iters: Sequence[int] | None) -> float | None:
    """Train both stages and answer the held-out questions, where that is not done; return the processor seconds."""
    stages = [folder / f"stage{number}" for number in (1, 2)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    has_trained = False
    for number, stage in enumerate(stages):
        if (stage / "loss.png").exists():  # comes last
            continue
        has_trained = True
        overrides = [
            f"checkpoint.save={stage}",
            f"training.micro_batch_size={BATCH_SIZES[number]}",
            "training.eval_interval=null",
            f"tokenizer.path={data}/tokenizer.model",
            f"data.train.path={data}/stage{number + 1}_train.jsonl",
            f"data.valid.path={data}/valid.jsonl",
            *([f"checkpoint.pretrained_checkpoint={stages[0]}"] if number else []),
            *([f"training.train_iters={train_iters[number]}"] if train_iters else []),
            *RUNS[name],
        ]
        megavlm("train", str(QUICKSTART / f"stage{number + 1}.yaml"), *overrides)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not (stages[-1] / "evaluation.json").exists():
        megavlm("eval", str(stages[-1]), "--show", "0")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime if has_trained else None


def megavlm(*arguments: str) -> None:
    """Run a command in one process; ends this program if it fails."""
    command = [sys.executable, "-m", "megavlm", *arguments]
    print(" ".join(command), flush=True)
    code = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"{' '.join(command)}: ended with exit code {code}")


def read(folder: Path, cpu_seconds: float | None) -> Result:
    """Read what a run left."""
    evaluation = json.loads((folder / "stage2" / "evaluation.json").read_text())
    points = [
        [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        for stage in ("stage1", "stage2")
    ]
    return Result(
        score=evaluation["score"]["value"],
        num_questions=len(evaluation["answers"]),
        validation_loss=[p["lm loss validation"] for p in points[-1] if "lm loss validation" in p][-1],
        losses=tuple(tuple(point["lm loss"] for point in stage if "lm loss" in point) for stage in points),
        cpu_seconds=cpu_seconds,
    )


def score_lost(results: Mapping[str, Result], name: str) -> float:
    """How far a run's held-out score is below bfloat16's."""
    return next(iter(results.values())).score - results[name].score


def table(results: Mapping[str, Result]) -> str:
    """The figures as Markdown."""
    lines = ["| run | held-out score | below bf16 by | validation loss | loss of the last steps |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, result in results.items():
        score = f"{result.score:.1%} of {result.num_questions}"
        losses = f"{result.validation_loss:.4f} | {result.last_loss:.4f}"
        lines.append(f"| {name} | {score} | {score_lost(results, name):+.1%} | {losses} |")
    return "\n".join(lines)


def write(folder: Path, results: Mapping[str, Result]) -> None:
    """Write the figures and the picture."""
    figures = {name: {**asdict(result), "last_loss": result.last_loss} for name, result in results.items()}
    text = json.dumps({"margin": MARGIN, "runs": figures}, indent=1)
    (folder / "fp8_curve.json").write_text(text + "\n", encoding="utf-8")
    draw(folder / "fp8_curve.png", results)
    print(f"{folder / 'fp8_curve.json'}, {folder / 'fp8_curve.png'}")


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Mean of each step and those before it."""
    width = min(SMOOTHED_OVER, len(losses))
    sums = np.cumsum(np.concatenate([[0.0], losses]))
    firsts = np.maximum(np.arange(1, len(losses) + 1) - width, 0)
    lasts = np.arange(1, len(losses) + 1)
    return (sums[lasts] - sums[firsts]) / (lasts - firsts)


def draw(path: Path, results: Mapping[str, Result]) -> None:
    """Loss over the steps of both stages, and the difference to bfloat16's."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained", height_ratios=(3, 2))
    reference = next(iter(results.values()))
    for name, result in results.items():
        start = 0
        for number, losses in enumerate(result.losses):
            steps = np.arange(start + 1, start + 1 + len(losses))
            style = {"color": _COLOURS[name], "linewidth": 1.2, "label": name if number == 0 else None}
            above.plot(steps, smoothed(losses), **style)
            if result is not reference:
                difference = np.subtract(losses, reference.losses[number])
                below.plot(steps, smoothed(difference), **style)
            start += len(losses)
    for axes in (above, below):
        axes.axvline(len(reference.losses[0]), color="gray", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    above.set(yscale="log", ylabel="training loss (nats)", title="The quickstart in bf16 and in emulated FP8")
    above.legend(title=f"mean of {SMOOTHED_OVER} steps")
    below.axhline(0.0, color="black", linewidth=0.8)
    below.set(xlabel="step (stage 1, then stage 2)", ylabel="loss minus that of bf16")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
