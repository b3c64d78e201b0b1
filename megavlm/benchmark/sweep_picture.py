"""Draws a sweep: what a step of each row goes to, and what more ranks bring."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from megavlm.benchmark.breakdown import COMMUNICATION, DATA_WAIT, LABELS, PIPELINE
from megavlm.benchmark.sweep_row import Row, efficiencies
from megavlm.benchmark.timeline import OTHER

matplotlib.use("Agg")  # no screen on a cluster

_COLORS = {
    DATA_WAIT: "#8c8c8c",
    "vision": "#4c72b0",
    "connector": "#64b5cd",
    "cross_attention": "#8172b2",
    "language": "#55a868",
    "optimizer": "#ccb974",
    PIPELINE: "#dd8452",
    COMMUNICATION: "#c44e52",
    OTHER: "#d9d9d9",
}


def draw_sweep(path: Path, rows: Sequence[Row]) -> None:
    """Draw the parts of a step of each row by sample and device, and the efficiency of more ranks where there are some.

    Args:
        path: the PNG to write.
        rows: in the order they are drawn; failed ones show why.
    """
    if not rows:
        return
    efficient = efficiencies(rows)
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.name in efficient:
            series[row.series].append((row.ranks, efficient[row.name]))
    curves = {name: sorted(points) for name, points in series.items() if len({ranks for ranks, _ in points}) > 1}
    widths = [2.6, 1.4] if curves else [2.6]
    size = (2.0 + 3.8 * sum(widths), 2.2 + 0.34 * len(rows))
    figure, panels = plt.subplots(
        1, len(widths), figsize=size, width_ratios=widths, squeeze=False, layout="constrained"
    )
    _draw_parts(panels[0, 0], rows)
    if curves:
        _draw_efficiency(panels[0, 1], curves, rows[0].scaling)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_parts(axes: Axes, rows: Sequence[Row]) -> None:
    named: set[str] = set()
    longest = max((_milliseconds(row) for row in rows), default=0.0) or 1.0
    for place, row in enumerate(rows):
        if row.speed is None or row.speed.detail is None:
            axes.text(0.01 * longest, place, row.status.replace("_", " "), va="center", color="#c44e52", fontsize=9)
            continue
        left, whole = 0.0, _milliseconds(row)
        for label in LABELS:
            width = whole * row.speed.detail.share(label)
            if row.speed.detail.breakdown_seconds[label] == 0.0:
                continue
            legend = None if label in named else label.replace("_", " ")
            axes.barh(place, width, left=left, color=_COLORS[label], label=legend, height=0.7)
            named.add(label)
            left += width
        axes.text(left + 0.01 * longest, place, f"MFU {row.speed.detail.mfu:.1%}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    axes.set(xlim=(0, 1.15 * longest), ylim=(len(rows) - 0.4, -0.6), xlabel="device milliseconds for a sample")
    axes.grid(alpha=0.3, axis="x")
    if named:
        order = [label.replace("_", " ") for label in LABELS]
        handles, labels = axes.get_legend_handles_labels()
        pairs = sorted(zip(labels, handles, strict=True), key=lambda pair: order.index(pair[0]))
        axes.legend(
            [handle for _, handle in pairs],
            [label for label, _ in pairs],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=5,
            fontsize=8,
            frameon=False,
        )


def _milliseconds(row: Row) -> float:
    """Of one device, for one sample."""
    rate = row.per_device("samples_per_second")
    return 1e3 / rate if rate else 0.0


def _draw_efficiency(axes: Axes, curves: dict[str, list[tuple[int, float]]], scaling: str) -> None:
    for name, points in curves.items():
        axes.plot([ranks for ranks, _ in points], [value for _, value in points], "o-", label=name, markersize=4)
    axes.axhline(1.0, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({ranks for points in curves.values() for ranks, _ in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0.0)
    axes.set(xlabel="ranks", title=f"samples/s of a device ({scaling} scaling)")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
