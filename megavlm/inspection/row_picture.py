"""Draws the rows of a step: which samples share one, and how much of it is padding."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy

from megavlm.batch import Batch
from megavlm.inspection.picture import legend, show_kinds
from megavlm.inspection.view import TOKEN_KINDS

_MOST_ROWS = 24


def draw_rows(path: Path, batches: Sequence[Batch], source_names: Sequence[str], image_token_id: int) -> None:
    """Draw the rows of some micro-batches: kinds of tokens, borders of samples, and their sources.

    Args:
        path: the PNG to write.
        batches: of one step.
        source_names: in the order of ``Batch.sources``.
        image_token_id: what stands where an image feature goes.
    """
    length = max(batch.tokens.shape[1] for batch in batches)
    grids = [_kinds(batch, length, image_token_id) for batch in batches]
    grid = numpy.concatenate(grids)[:_MOST_ROWS]
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.34 * len(grid)), layout="constrained")
    show_kinds(axes, grid)
    row = 0
    for batch in batches:
        for first, stop, source in _samples(batch):
            here = row + first // batch.tokens.shape[1]
            if here >= len(grid):
                break
            column = first % batch.tokens.shape[1]
            axes.plot([column - 0.5] * 2, [here - 0.5, here + 0.5], color="black", linewidth=1.5)
            name = source_names[source] if len(source_names) > 1 else ""
            if name and stop - first > length * 0.03:
                axes.text(column + 0.006 * length, here, name[:16], fontsize=6, va="center")
        row += batch.tokens.shape[0]
        if row < len(grid):
            axes.axhline(row - 0.5, color="tab:red", linewidth=0.9)
    used, room = sum(int(batch.num_tokens) for batch in batches), sum(batch.tokens.numel() for batch in batches)
    shown = f"first {len(grid)} rows" if row > len(grid) else f"{len(grid)} rows"
    axes.set_title(
        f"one step: {shown}; {100.0 * used / room:.1f} % of {room} places are tokens of samples, the rest is padding\n"
        "black: a sample begins; red: the next micro-batch",
        fontsize=9,
        loc="left",
    )
    axes.set_yticks(range(len(grid)))
    patches = [patch for patch in legend() if patch.get_label() != "tag"]
    axes.legend(handles=patches, ncols=3, fontsize=7, loc="upper right", bbox_to_anchor=(1.0, -0.06), frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _kinds(batch: Batch, length: int, image_token_id: int) -> numpy.ndarray:
    """``[N, length]``: numbers of kinds, of padding the number behind the last. Tags count as text here."""
    num_rows, own_length = batch.tokens.shape
    grid = numpy.full((num_rows, length), len(TOKEN_KINDS))
    tokens = batch.tokens.numpy()
    trained = numpy.roll(batch.loss_mask.numpy() > 0, 1, axis=1)  # the token behind the position that has the loss
    trained[:, 0] = False
    kinds = numpy.where(trained, TOKEN_KINDS.index("trained"), TOKEN_KINDS.index("text"))
    kinds = numpy.where(tokens == image_token_id, TOKEN_KINDS.index("image"), kinds)
    padding = batch.is_padding()
    if padding is not None:
        kinds = numpy.where(padding.numpy(), len(TOKEN_KINDS), kinds)
    grid[:, :own_length] = kinds
    return grid


def _samples(batch: Batch) -> list[tuple[int, int, int]]:
    """First and last place of each sample in the flattened batch, and its source."""
    bounds = batch.cu_seqlens.tolist()
    sources = batch.sources.tolist() or [0] * (len(bounds) - 1)
    return list(zip(bounds[:-1], bounds[1:], sources, strict=True))
