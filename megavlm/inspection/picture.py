"""Draws a sample: its images with their tiles, the tiles as the model sees them, and its tokens."""

import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from megavlm.data.image import load_image
from megavlm.inspection.text import describe
from megavlm.inspection.view import TOKEN_KINDS, ImageView, SampleView

matplotlib.use("Agg")  # no screen on a cluster

COLOURS = {"trained": "#2ca02c", "text": "#c7c7c7", "tag": "#ffbf00", "image": "#17becf", "padding": "#ffffff"}
"""Of the kinds of tokens, and of what fills rows."""

_MOST_IMAGES = 6
_MOST_TILES = 16
_TILES_A_ROW = 8
_TOKENS_A_ROW = 128
_MOST_TOKEN_ROWS = 24
_WIDTH_INCHES = 12.0


def draw_sample(path: Path, view: SampleView, max_pixels: int) -> None:
    """Draw one sample.

    Args:
        path: the PNG to write.
        view: of the sample.
        max_pixels: larger images are not read.
    """
    images = view.images[:_MOST_IMAGES]
    num_tiles = min(view.sample.tiles.shape[0], _MOST_TILES)
    tile_rows = -(-num_tiles // _TILES_A_ROW)
    token_rows = min(_MOST_TOKEN_ROWS, max(1, -(-view.sample.num_tokens // _TOKENS_A_ROW)))
    heights = [*([3.4] if images else []), *[1.9] * tile_rows, 0.7 + 0.22 * token_rows, 1.1]
    figure = plt.figure(figsize=(_WIDTH_INCHES, sum(heights) + 1.0), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    place = 0
    if images:
        for axes, image in zip(parts[0].subplots(1, len(images), squeeze=False).flat, images, strict=True):
            _draw_image(axes, image, max_pixels)
        place = 1
    tags = [tag for image in view.images for tag in image.tags]
    for row in range(tile_rows):
        for column, axes in enumerate(parts[place].subplots(1, _TILES_A_ROW, squeeze=False).flat):
            number = row * _TILES_A_ROW + column
            axes.axis("off")
            if number < num_tiles:
                axes.imshow(view.sample.tiles[number].permute(1, 2, 0).numpy())
                axes.set_title(_plain(f"{number}: {textwrap.shorten(tags[number], 26) or 'no tag'}"), fontsize=6.5)
        place += 1
    _draw_tokens(parts[place].subplots(), view, token_rows)
    _draw_weights(parts[place + 1].subplots(), view)
    left_out = [
        f"{total - shown} more {what}"
        for total, shown, what in (
            (len(view.images), len(images), "images"),
            (view.sample.tiles.shape[0], num_tiles, "tiles"),
            (view.sample.num_tokens, token_rows * _TOKENS_A_ROW, "tokens"),
        )
        if total > shown
    ]
    title = f"[{view.source}] {textwrap.shorten(view.sample.key, 110)}\n{textwrap.shorten(describe(view), 140)}"
    figure.suptitle(_plain(title + (f"  (not drawn: {', '.join(left_out)})" if left_out else "")), fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_image(axes: Axes, image: ImageView, max_pixels: int) -> None:
    axes.imshow(load_image(image.source, max_pixels))
    colours = plt.get_cmap("tab10")
    for number, (left, top, right, bottom) in enumerate(image.boxes):
        if image.layout.num_tiles > 1 and image.layout.is_whole_image(number):
            continue
        colour = colours(number % 10)
        inset = 0.006 * max(image.size) * (number % 3)  # tiles may overlap: no border hides another
        axes.add_patch(
            Rectangle(
                (left - 0.5 + inset, top - 0.5 + inset),
                right - left - 2 * inset,
                bottom - top - 2 * inset,
                fill=False,
                edgecolor=colour,
                linewidth=1.6,
            )
        )
        axes.text(
            (left + right) / 2,
            (top + bottom) / 2,
            str(image.first_tile + number),
            color="white",
            fontsize=9,
            ha="center",
            va="center",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )
    lost = ", degraded" if image.is_degraded else ""
    axes.set_title(f"{image.size[0]} x {image.size[1]}, {image.layout.num_tiles} tile(s){lost}", fontsize=8)
    axes.tick_params(labelsize=6)


def _draw_tokens(axes: Axes, view: SampleView, num_rows: int) -> None:
    """Rows of tokens, each a square in the colour of its kind; positions on the axes."""
    kinds = [TOKEN_KINDS.index(kind) for kind in view.kinds()][: num_rows * _TOKENS_A_ROW]
    grid = numpy.full(num_rows * _TOKENS_A_ROW, len(TOKEN_KINDS))
    grid[: len(kinds)] = kinds
    show_kinds(axes, grid.reshape(num_rows, _TOKENS_A_ROW))
    axes.set_yticks(range(num_rows), [str(row * _TOKENS_A_ROW) for row in range(num_rows)], fontsize=6)
    axes.set_xlabel("tokens, by position", fontsize=7)
    axes.legend(handles=legend(), ncols=4, fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _draw_weights(axes: Axes, view: SampleView) -> None:
    """The weight of the loss at each position: of predicting the token behind it."""
    weights = view.sample.loss_mask.numpy()
    axes.fill_between(range(len(weights)), weights, step="post", color=COLOURS["trained"], linewidth=0.5)
    axes.set_xlim(0, max(1, len(weights)))
    axes.set_ylim(0, max(1e-6, float(weights.max(initial=0.0))) * 1.1)
    axes.set_xlabel("weight of the loss, by position", fontsize=7)
    axes.tick_params(labelsize=6)


def show_kinds(axes: Axes, grid: numpy.ndarray) -> None:
    """Draw numbers of kinds, ``[rows, columns]``, the number behind the last kind for padding."""
    colours = ListedColormap([COLOURS[kind] for kind in (*TOKEN_KINDS, "padding")])
    axes.imshow(grid, cmap=colours, vmin=0, vmax=len(TOKEN_KINDS), aspect="auto", interpolation="nearest")
    axes.tick_params(labelsize=6)


def legend() -> list[Patch]:
    """A patch of colour for each kind of token."""
    return [Patch(color=COLOURS[kind], label=kind) for kind in TOKEN_KINDS]


def _plain(text: str) -> str:
    """Text of which matplotlib takes nothing for a formula."""
    return text.replace("$", r"\$")
