"""Draws a run's loss curve."""

import statistics
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from megavlm.training.report import read_metrics

matplotlib.use("Agg")  # no screen on a cluster


def draw_loss(folder: Path) -> Path:
    """Draw ``loss.png`` of a run folder from its metrics: training loss, its running median, validation, learning rate.

    Returns:
        The path of the picture.
    """
    points = read_metrics(folder)
    trained = [(point["iteration"], point["lm loss"]) for point in points if point.get("trained tokens")]
    validated = [(p["iteration"], p["lm loss validation"]) for p in points if "lm loss validation" in p]
    rates = [(point["iteration"], point["lr"]) for point in points if "lr" in point]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
        width = max(1, len(losses) // 50)
        smooth = [statistics.median(losses[max(0, at - width) : at + 1]) for at in range(len(losses))]
        axes.plot(steps, smooth, color="tab:blue", label=f"running median of {width + 1}")
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="loss of trained tokens (nats)", title=folder.name)
    if trained and min(loss for _, loss in trained) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    if rates:
        rate_axes = axes.twinx()
        rate_axes.plot(*zip(*rates, strict=True), color="gray", linewidth=0.8, linestyle="--")
        rate_axes.set_ylabel("learning rate (dashed)", color="gray")
    path = folder / "loss.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
