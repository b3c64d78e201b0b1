"""Shows what a recipe makes of its data: samples in training order, and the rows of one step."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from megavlm.build import build_processor
from megavlm.inspection.picture import draw_sample
from megavlm.inspection.row_picture import draw_rows
from megavlm.inspection.step import Source
from megavlm.inspection.summary import SourceSummary, counts_of, summarize
from megavlm.inspection.text import print_legend, print_summary, print_view
from megavlm.inspection.view import SampleView, SkippedView
from megavlm.recipe import Recipe


def show_data(
    recipe: Recipe, *, num_samples: int, start: int, out: Path | None, console: Console
) -> list[SourceSummary]:
    """Print samples of a recipe's training data, and draw them into a folder.

    Args:
        recipe: names data, tokenizer and model; no model is made.
        num_samples: how many to look at.
        start: the first, in training order.
        out: for ``000.png`` and so on, ``rows.png`` (a step as the loader gives it) and ``summary.json``; None: only
            print.
        console: to print on.

    Returns:
        Counts for each source.

    Raises:
        ValueError: the data cannot be opened, a number is out of range, or the folder cannot be written.
    """
    if num_samples < 1 or start < 0:
        raise ValueError(f"--num={num_samples}, --start={start}: must be at least 1 and 0.")
    dataset = recipe.data.train.build()
    source = Source(recipe, "train", dataset, build_processor(recipe).for_training(recipe.training.seed))
    for row in dataset.bad_rows:
        console.print(f"unusable row: {row}", markup=False, highlight=False)
    positions = range(start, start + num_samples)
    views = list(source.views(positions))
    print_legend(console)
    for number, view in zip(positions, views, strict=True):
        print_view(console, number, view)
    counted = (counts_of(view) if isinstance(view, SampleView) else view for view in views)
    summaries = summarize(counted, source.names)
    print_summary(console, summaries)
    if out is not None:
        try:
            _draw(out, source, list(zip(positions, views, strict=True)), summaries)
        except OSError as error:
            raise ValueError(f"--out={out}: cannot be written ({error}). Choose another folder.") from None
    return summaries


def _draw(
    out: Path,
    source: Source,
    views: list[tuple[int, SampleView | SkippedView]],
    summaries: list[SourceSummary],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for number, view in views:
        if isinstance(view, SampleView):
            draw_sample(out / f"{number:03d}.png", view, source.recipe.data.max_image_pixels)
    batches = next(iter(source.loader()))
    draw_rows(out / "rows.png", batches, source.names, source.processor.tokenizer.image_token_id)
    skipped = [{"source": view.source, **asdict(view.skipped)} for _, view in views if isinstance(view, SkippedView)]
    tree = {
        "sources": [asdict(one) for one in summaries],
        "skipped": skipped,
        "num_bad_rows": source.dataset.num_bad_rows,
    }
    (out / "summary.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
