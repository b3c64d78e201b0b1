"""Draws a comparison: loss curves, exact match, speed."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from megavlm.benchmark.comparison import Chain, PlannedStage
from megavlm.benchmark.results import Results
from megavlm.training.report import METRICS_FILE, read_metrics

matplotlib.use("Agg")  # no screen on a cluster

_POINTS = 40
"""A curve is smoothed over this fraction of its steps."""


def draw_comparison(path: Path, chains: Sequence[Chain], results: Results) -> None:
    """Draw what there is: the stages' losses one behind the other, exact match and samples/s of each variant; and the
    last stage's loss against operations, where variants differ in them.

    Args:
        path: the PNG to write.
        chains: all runs; those without metrics are left out.
        results: what is finished.
    """
    colors = {variant: f"C{number % 10}" for number, variant in enumerate(results.variants)}
    trained = [chain for chain in chains if (chain.stages[0].folder / METRICS_FILE).exists()]
    by_flops = bool(trained) and _differ_in_flops(results)
    scored = ["exact match", *results.scores] if results.runs else []
    widths = [2.2] * (bool(trained) + by_flops) + [1.0] * (len(scored) + bool(results.rounds))
    if not widths:
        return
    size = (1.0 + 3.6 * sum(widths), 4.6)
    figure, row = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False, layout="constrained")
    axes = iter(row.flat)
    if trained:
        _draw_losses(next(axes), trained, colors)
    if by_flops:
        _draw_losses_by_flops(next(axes), trained, colors, results)
    for name in scored:
        scores = {
            variant: [run.scores.get(name, run.exact_match) for run in results.of(variant)]
            for variant in results.variants
        }
        panel = next(axes)
        _draw_bars(panel, scores, colors, f"{name} (mean; dots: seeds)", statistics.fmean)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    if results.rounds:
        speeds = {v: results.speeds(v, lambda speed: speed.samples_per_second) for v in results.variants}
        _draw_bars(next(axes), speeds, colors, "samples/s (median; dots: rounds)", statistics.median)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of each value and those just before it, over one part in 40 of the curve."""
    width = len(values) // _POINTS
    return [statistics.fmean(values[max(0, at - width) : at + 1]) for at in range(len(values))]


def _draw_losses(axes: Axes, chains: Sequence[Chain], colors: Mapping[str, str]) -> None:
    named = set()
    lowest, longest = float("inf"), 0
    for chain in chains:
        start = 0
        for stage in chain.stages:
            steps, losses = _curve(stage)
            if losses:
                label = None if chain.variant in named else chain.variant
                places = [start + step for step in steps]
                axes.plot(places, smooth(losses), color=colors[chain.variant], label=label, linewidth=1.2, alpha=0.8)
                named.add(chain.variant)
                lowest = min(lowest, *losses)
            start += stage.recipe.training.train_iters
        longest = max(longest, start)
    start = 0
    for stage in chains[0].stages:
        if start:
            axes.axvline(start, color="gray", linewidth=0.8, linestyle=":")
        middle = start + stage.recipe.training.train_iters / 2
        above = axes.get_xaxis_transform()
        axes.text(middle, 1.01, stage.name, transform=above, color="gray", fontsize=9, horizontalalignment="center")
        start += stage.recipe.training.train_iters
    axes.set(xlabel="step", ylabel="loss of trained tokens (nats), smoothed", xlim=(0, longest))
    _finish_losses(axes, lowest)
    if named:
        axes.legend(loc="upper right")


def _draw_losses_by_flops(axes: Axes, chains: Sequence[Chain], colors: Mapping[str, str], results: Results) -> None:
    """The last stage's losses, each as far to the right as it cost."""
    lowest = float("inf")
    for chain in chains:
        steps, losses = _curve(chain.last)
        of_run = results.flops_of_run(chain.variant)
        if not losses or of_run is None:
            continue
        per_step = of_run / chain.last.recipe.training.train_iters
        axes.plot(
            [step * per_step / 1e12 for step in steps],
            smooth(losses),
            color=colors[chain.variant],
            linewidth=1.2,
            alpha=0.8,
        )
        lowest = min(lowest, *losses)
    axes.set(xlabel="TFLOP", title=f"{chains[0].last.name}, by operations", xlim=(0, None))
    axes.title.set_fontsize(10)
    _finish_losses(axes, lowest)


def _differ_in_flops(results: Results) -> bool:
    """Whether a step or a run of one variant costs visibly more than of another."""
    runs = [results.flops_of_run(variant) or 0.0 for variant in results.variants]
    samples = [speed.flops_per_sample for one in results.rounds for speed in one.values()]
    return any(max(costs) > 1.1 * min(costs) for costs in (runs, samples) if costs)


def _curve(stage: PlannedStage) -> tuple[list[int], list[float]]:
    """Steps of a stage that trained tokens, and their losses."""
    points = read_metrics(stage.folder) if (stage.folder / METRICS_FILE).exists() else []
    kept = [point for point in points if point.get("trained tokens")]
    return [point["iteration"] for point in kept], [point["lm loss"] for point in kept]


def _finish_losses(axes: Axes, lowest: float) -> None:
    """Logarithmic axis with plain numbers, and a grid."""
    if 0.0 < lowest < float("inf"):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # 0.2, not 2 x 10^-1
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _draw_bars(
    axes: Axes,
    values: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
    title: str,
    summary: Callable[[Sequence[float]], float],
) -> None:
    for place, (variant, single) in enumerate(values.items()):
        if not single:
            continue
        axes.bar(place, summary(single), color=colors[variant], alpha=0.6, width=0.7)
        spread = [place + 0.08 * (number - (len(single) - 1) / 2) for number in range(len(single))]
        axes.plot(spread, single, "o", color="black", markersize=4, alpha=0.8)
    axes.set_xticks(range(len(values)), list(values), rotation=30 if max(map(len, values)) > 8 else 0)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="y")
