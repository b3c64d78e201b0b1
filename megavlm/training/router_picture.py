"""Draws how a run's routers spread the tokens over the experts."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megavlm.training.report import read_metrics

matplotlib.use("Agg")  # no screen on a cluster

_COLORS = {"all": "black", "image": "tab:orange", "text": "tab:blue"}
_STRONGEST = 8.0
"""Loads beyond this many times the even share, and below its inverse, have the last colour."""
_MOST_WRITTEN = 12
"""Layers and experts up to which each cell has its number."""
_PANELS_A_ROW = 3


def draw_routers(folder: Path) -> Path:
    """Draw ``router.png`` of a run folder from its metrics.

    Above, for each modality (and each data source, if there are several) the load of every expert of every layer as a
    multiple of its even share, in the steps before the last evaluation or checkpoint. Below, the load of the busiest
    expert over the steps: the worst layer's, and the mean of all layers dotted.

    Returns:
        The path of the picture.

    Raises:
        ValueError: the run has written no loads: its model has no experts, or it has not come far enough.
    """
    points = read_metrics(folder)
    loads = [point for point in points if "router load" in point]
    if not loads:
        raise ValueError(f"{folder}: its metrics hold no load of an expert. Train a model with experts there first.")
    last = loads[-1]["router load"]
    views = [view for view in last["views"] if view["name"] != "all"]
    num_columns = min(_PANELS_A_ROW, len(views))
    num_rows = -(-len(views) // num_columns)
    map_height = max(2.4, 1.2 + 0.09 * min(60, len(last["layers"])))
    figure = plt.figure(figsize=(4.2 * max(2, num_columns), map_height * num_rows + 3.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[map_height * num_rows, 3.2])
    maps, curve = halves
    _draw_maps(maps, views, last["layers"], num_rows, num_columns)
    start = loads[-1]["iteration"] - last["steps"]
    maps.suptitle(f"{folder.name}: load of each expert, steps {start + 1} to {loads[-1]['iteration']} (1: even share)")
    axes = curve.subplots()
    _draw_curves(axes, [(point["iteration"], point["router"]["views"]) for point in points if "router" in point])
    path = folder / "router.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_maps(figure: Any, views: list[dict[str, Any]], layers: list[int], num_rows: int, num_columns: int) -> None:
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    norm = LogNorm(1.0 / _STRONGEST, _STRONGEST, clip=True)
    image = None
    for axes, view in zip(panels.flat, views, strict=False):
        # a dead expert has load 0, which has no logarithm
        clipped = [[max(load, 1.0 / _STRONGEST) for load in row] for row in view["load"]]
        image = axes.imshow(clipped, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        axes.set(title=f"{view['name']} ({view['tokens']:,} tokens)", xlabel="expert")
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        if len(layers) > _MOST_WRITTEN:
            step = -(-len(layers) // _MOST_WRITTEN)
            axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(view["load"][0]) <= _MOST_WRITTEN and len(layers) <= _MOST_WRITTEN:
            _write_numbers(axes, view["load"])
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    for axes in panels.flat[len(views) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=panels, extend="both", aspect=20 * num_rows)
    ticks = [1.0 / _STRONGEST, 0.25, 0.5, 1.0, 2.0, 4.0, _STRONGEST]
    bar.set_ticks(ticks, labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _write_numbers(axes: Axes, loads: list[list[float]]) -> None:
    for row, values in enumerate(loads):
        for column, load in enumerate(values):
            is_dark = not 0.25 < load < 4.0
            text = "dead" if load == 0.0 else f"{load:.2f}"
            color = "white" if is_dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def _draw_curves(axes: Axes, points: list[tuple[int, list[dict[str, Any]]]]) -> None:
    names = dict.fromkeys(view["name"] for _, views in points for view in views)
    for number, name in enumerate(names):
        curve = [(step, view["max/mean load"]) for step, views in points for view in views if view["name"] == name]
        steps = [step for step, _ in curve]
        color = _COLORS.get(name, f"C{number}")  # C0 and C1 are those of text and images
        [line] = axes.plot(
            steps, [max(loads) for _, loads in curve], color=color, label=name, marker=".", linewidth=1.2
        )
        means = [sum(loads) / len(loads) for _, loads in curve]
        axes.plot(steps, means, color=line.get_color(), linestyle=":", linewidth=1.0)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel="busiest expert / even share", title="worst layer (dotted: mean of the layers)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
    if names:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
