"""Shows what a recipe makes of its data: samples in training order, and the rows of one step."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megavlm.batch import Batch
from megavlm.build import build_processor
from megavlm.data import Dataset, Loader, PackedLoader, SampleProcessor
from megavlm.inspection.picture import draw_sample
from megavlm.inspection.row_picture import draw_rows
from megavlm.inspection.summary import SourceSummary, summarize
from megavlm.inspection.text import print_legend, print_summary, print_view
from megavlm.inspection.view import SampleView, SkippedView, view_samples
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
    config = recipe.data.train
    dataset = config.build()
    processor = build_processor(recipe)
    for row in dataset.bad_rows:
        console.print(f"unusable row: {row}", markup=False, highlight=False)
    positions = range(start, start + num_samples)
    views = list(
        view_samples(
            dataset, config.source_names, processor, positions, seed=recipe.training.seed, shuffle=recipe.data.shuffle
        )
    )
    print_legend(console)
    for number, view in zip(positions, views, strict=True):
        print_view(console, number, view)
    summaries = summarize(views, config.source_names)
    print_summary(console, summaries)
    if out is not None:
        try:
            _draw(out, recipe, dataset, processor, list(zip(positions, views, strict=True)), summaries)
        except OSError as error:
            raise ValueError(f"--out={out}: cannot be written ({error}). Choose another folder.") from None
    return summaries


def _draw(
    out: Path,
    recipe: Recipe,
    dataset: Dataset,
    processor: SampleProcessor,
    views: list[tuple[int, SampleView | SkippedView]],
    summaries: list[SourceSummary],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for number, view in views:
        if isinstance(view, SampleView):
            draw_sample(out / f"{number:03d}.png", view, recipe.data.max_image_pixels)
    batches = _first_step(recipe, dataset, processor)
    draw_rows(out / "rows.png", batches, recipe.data.train.source_names, processor.tokenizer.image_token_id)
    skipped = [{"source": view.source, **asdict(view.skipped)} for _, view in views if isinstance(view, SkippedView)]
    tree = {"sources": [asdict(one) for one in summaries], "skipped": skipped, "num_bad_rows": dataset.num_bad_rows}
    (out / "summary.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _first_step(recipe: Recipe, dataset: Dataset, processor: SampleProcessor) -> list[Batch]:
    """The micro-batches that a run in one process would begin with."""
    training = recipe.training
    settings: dict[str, Any] = {
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "seed": training.seed,
        "shuffle": recipe.data.shuffle,
        "pad_multiple": recipe.engine.pad_multiple,
    }
    if recipe.data.packing is not None:
        return next(iter(PackedLoader(dataset, processor, recipe.data.packing, **settings)))
    return next(iter(Loader(dataset, processor, **settings)))
