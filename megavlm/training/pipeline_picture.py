"""Draws what the stages of a pipeline do in a step, before and after its micro-batches are put in order."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from megavlm.data import MicroBatchCost, balanced_order, simulate_pipeline

matplotlib.use("Agg")  # no screen on a cluster


def draw_pipeline(path: Path, costs: Sequence[MicroBatchCost], num_stages: int) -> tuple[float, float]:
    """Draw the simulated step in the given and in the balanced order, one above the other.

    Args:
        path: the PNG to write.
        costs: of the micro-batches.
        num_stages: of the pipeline.

    Returns:
        The idle share of the stages before and after.
    """
    orders = {"as they come": list(range(len(costs))), "in order": balanced_order(costs, num_stages)}
    figure, grid = plt.subplots(2, 1, figsize=(11, 1.2 + 0.9 * num_stages), sharex=True, layout="constrained")
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    idle = []
    for axes, (name, order) in zip(grid, orders.items(), strict=True):
        time = simulate_pipeline([costs[number] for number in order], num_stages)
        idle.append(time.idle_share)
        for entry in time.passes:
            number = order[entry.micro_batch]
            axes.barh(
                entry.stage,
                entry.end - entry.start,
                left=entry.start,
                height=0.85,
                color=colors[number % len(colors)],
                alpha=1.0 if entry.is_forward else 0.5,
                edgecolor="black",
                linewidth=0.4,
            )
            middle = (entry.start + entry.end) / 2
            axes.text(middle, entry.stage, str(number), ha="center", va="center", fontsize=7)
        axes.set_title(
            f"{name}: {time.span:.0f} units, {100 * time.idle_share:.1f}% of the stages' time idle", fontsize=10
        )
        axes.set(ylabel="stage", yticks=range(num_stages), ylim=(num_stages - 0.4, -0.6))
    grid[-1].set_xlabel("time (forward passes full, backward passes pale; numbers are micro-batches)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return idle[0], idle[1]
