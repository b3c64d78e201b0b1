"""Draws what a model answered: images with their tile grid, question, answer and truth."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from megavlm.data import SampleProcessor
from megavlm.data.image import load_image
from megavlm.evaluation.score import ScoredAnswer

matplotlib.use("Agg")  # no screen on a cluster

_COLUMNS = 3


def draw_samples(path: Path, answers: Sequence[ScoredAnswer], processor: SampleProcessor, *, most: int = 9) -> None:
    """Draw some answered questions, those with most tiles first and wrong ones among them if there are any.

    Args:
        path: the PNG to write.
        answers: of an evaluation.
        processor: knows how images are tiled.
        most: pictures to draw.
    """
    chosen = _choose([answer for answer in answers if answer.images and not answer.problem], most)
    if not chosen:
        return
    num_rows = -(-len(chosen) // _COLUMNS)
    figure, grid = plt.subplots(num_rows, _COLUMNS, figsize=(4.2 * _COLUMNS, 3.9 * num_rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, answer in zip(grid.flat, chosen, strict=False):
        image = load_image(answer.images[-1], processor.config.max_image_pixels)
        layout = processor.tiling.layout(*image.size)
        axes.imshow(image)
        boxes = processor.tiling.boxes(layout, *image.size)
        for tile, (left, top, right, bottom) in enumerate(boxes):
            if not layout.is_whole_image(tile):
                corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
                axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="tab:cyan", linewidth=1.2))
        mark = "right" if answer.is_right else "WRONG"
        axes.set_title(
            _plain(f"{answer.question}\nmodel: {answer.answer}   truth: {answer.references[0]}   ({mark})"),
            fontsize=9,
            color="tab:green" if answer.is_right else "tab:red",
            wrap=True,
        )
    figure.suptitle("Some of the questions (cyan: borders of the tiles)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _choose(answers: Sequence[ScoredAnswer], most: int) -> list[ScoredAnswer]:
    """Up to a third wrong answers, the rest right ones, spread over the numbers of tiles."""
    by_tiles = sorted(answers, key=lambda answer: -(answer.num_tiles or 0))
    wrong = [answer for answer in by_tiles if not answer.is_right]
    right = [answer for answer in by_tiles if answer.is_right]
    num_wrong = min(len(wrong), max(most // 3, most - len(right)))
    num_right = min(len(right), most - num_wrong)
    spread = [right[index * len(right) // num_right] for index in range(num_right)] if num_right else []
    return [*spread, *wrong[:num_wrong]]


def _plain(text: str) -> str:
    """Text of which matplotlib takes nothing for a formula."""
    return text.replace("$", r"\$")
