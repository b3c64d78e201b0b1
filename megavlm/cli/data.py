"""``megavlm data prepare``, ``megavlm data filter``, ``megavlm data show`` and ``megavlm data inspect``."""

import argparse
from pathlib import Path

from rich.console import Console

from megavlm.cli.argument import add_recipe, add_verb
from megavlm.cli.data_filter import add_filters
from megavlm.config import load_recipe
from megavlm.inspection import inspect_data, show_data
from megavlm.inspection.gallery import DEFAULT_NUM, DEFAULT_NUM_COUNTED, MODES
from megavlm.inspection.step import SPLITS
from megavlm.prepare import BAD_ROWS, FORMATS, FormatOptions, ImageLimits, Prepared, PrepareSettings, prepare
from megavlm.prepare.progress_bar import ProgressBar
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER, start_log


def add(parent: argparse._SubParsersAction) -> None:
    """Add the verbs."""
    data = add_verb(parent, "data", None, "prepare, filter and look at training data")
    verbs = data.add_subparsers(dest="data_verb", required=True, metavar="WHAT")
    _add_prepare(verbs)
    add_filters(verbs)
    _add_show(verbs)
    _add_inspect(verbs)


def _add_prepare(verbs: argparse._SubParsersAction) -> None:
    verb = add_verb(verbs, "prepare", _prepare, "make tar shards of a file or folder; what is there already stays")
    verb.set_defaults(verb="data prepare")
    options, limits = FormatOptions(), ImageLimits()
    verb.add_argument(
        "source", type=Path, help="JSON or JSONL file, HTML or text file, or a folder of them or of images"
    )
    verb.add_argument("out", type=Path, help="folder of the shards")
    verb.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="of the source (default: auto)")
    verb.add_argument(
        "--image-root", type=Path, metavar="FOLDER", help="where images' paths begin (default: the file's)"
    )
    verb.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="rows of a shard (1000)")
    verb.add_argument("--workers", type=int, default=2, metavar="N", help="processes; 0: this one (2)")
    verb.add_argument("--max-row-bytes", type=int, default=options.max_row_bytes, metavar="N", help="of a row or page")
    verb.add_argument(
        "--max-document-characters",
        type=int,
        default=options.max_document_characters,
        metavar="N",
        help="plain text is cut into documents of at most so many",
    )
    verb.add_argument("--max-image-pixels", type=int, default=limits.max_image_pixels, metavar="N", help="of an image")
    verb.add_argument("--max-image-bytes", type=int, default=limits.max_image_bytes, metavar="N", help="of its file")
    verb.add_argument("--min-image-side", type=int, default=limits.min_image_side, metavar="N", help="in pixels")
    verb.add_argument(
        "--bad-images",
        choices=("drop", "row"),
        default="drop",
        help="an image of a document that cannot be used: drop it, or the whole row (default: drop)",
    )


def _prepare(options: argparse.Namespace) -> None:
    start_log()
    settings = PrepareSettings(
        format=options.format,
        samples_per_shard=options.samples_per_shard,
        num_workers=options.workers,
        options=FormatOptions(options.image_root, options.max_row_bytes, options.max_document_characters),
        limits=ImageLimits(
            max_image_pixels=options.max_image_pixels,
            max_image_bytes=options.max_image_bytes,
            min_image_side=options.min_image_side,
            drops_bad_images=options.bad_images == "drop",
        ),
    )
    with ProgressBar("rows") as bar:
        prepared = prepare(options.source, options.out, settings, bar.show)
    _say(prepared)


def _say(prepared: Prepared) -> None:
    LOGGER.info(
        "%s: %d samples with %d images in %d shards (format %s, %d rows of the source)",
        prepared.folder,
        prepared.num_samples,
        prepared.num_images,
        prepared.num_shards,
        prepared.format,
        prepared.num_items,
    )
    if prepared.num_shards_found:
        LOGGER.info("%d shards were there already", prepared.num_shards_found)
    if prepared.reasons:
        reasons = ", ".join(f"{name} {count}" for name, count in prepared.reasons.items())
        LOGGER.warning(
            "left out: %d rows, and %d images of documents (%s); each is listed in %s",
            prepared.num_bad_rows,
            prepared.num_bad_images,
            reasons,
            prepared.folder / BAD_ROWS,
        )


def _add_show(verbs: argparse._SubParsersAction) -> None:
    verb = add_verb(verbs, "show", _show, "print and draw what a recipe makes of its training data")
    verb.set_defaults(verb="data show")
    add_recipe(verb)
    verb.add_argument("--num", type=int, default=16, metavar="N", help="samples to look at (16)")
    verb.add_argument("--start", type=int, default=0, metavar="N", help="the first of them, in training order (0)")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="draw them there (default: only print)")


def _show(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    show_data(recipe, num_samples=options.num, start=options.start, out=options.out, console=Console())
    if options.out is not None:
        print(f"pictures: {options.out}")


def _add_inspect(verbs: argparse._SubParsersAction) -> None:
    verb = add_verb(verbs, "inspect", _inspect, "write a page (HTML) of what the model gets of a recipe's data")
    verb.set_defaults(verb="data inspect")
    add_recipe(verb)
    verb.add_argument(
        "--out", type=Path, metavar="FILE", help="the page, or a folder (inspect.html; with --mode sample: inspect)"
    )
    verb.add_argument("--num", type=int, default=DEFAULT_NUM, metavar="N", help=f"samples to show ({DEFAULT_NUM})")
    verb.add_argument("--start", type=int, default=0, metavar="N", help="the first, in the order of training (0)")
    verb.add_argument("--split", choices=SPLITS, default="train", help="which data (default: train)")
    verb.add_argument("--mode", choices=MODES, default="gallery", help="one page, or one for each sample too")
    verb.add_argument(
        "--count",
        type=int,
        default=DEFAULT_NUM_COUNTED,
        metavar="N",
        help=f"samples that the summary counts, without reading pixels ({DEFAULT_NUM_COUNTED})",
    )


def _inspect(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    with ProgressBar("samples") as bar:
        pages = inspect_data(
            recipe,
            title=str(options.recipe),
            out=options.out or Path("inspect.html" if options.mode == "gallery" else "inspect"),
            mode=options.mode,
            split=options.split,
            num_samples=options.num,
            start=options.start,
            num_counted=options.count,
            show=bar.show,
        )
    size = sum(page.stat().st_size for page in pages)
    print(f"{pages[0]}: {len(pages)} page(s), {size / 1e6:.1f} MB; open it in a browser")
