"""Makes pages of what a recipe makes of its data: samples as the model gets them, and a summary of the data set."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megavlm.build import build_processor
from megavlm.inspection.card import SampleCard, UnusedCard
from megavlm.inspection.card_maker import CardMaker
from megavlm.inspection.histogram import histogram
from megavlm.inspection.legible import legible
from megavlm.inspection.page import BrokenRow, PageSummary, PageWriter
from megavlm.inspection.step import Source, Split, UnusedSample, micro_batches
from megavlm.inspection.summary import summarize
from megavlm.inspection.view import SkippedView
from megavlm.recipe import Recipe

Mode = Literal["gallery", "sample"]
MODES: tuple[Mode, ...] = ("gallery", "sample")

DEFAULT_NUM = 24
DEFAULT_NUM_COUNTED = 1000

_MOST_LISTED = 200
_AT_OPENING = "found_at_opening"
_PAGE_SUFFIXES = (".html", ".htm")

Card = SampleCard | UnusedCard


def inspect_data(
    recipe: Recipe,
    *,
    title: str,
    out: Path,
    mode: Mode = "gallery",
    split: Split = "train",
    num_samples: int = DEFAULT_NUM,
    start: int = 0,
    num_counted: int = DEFAULT_NUM_COUNTED,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write pages that show samples of a recipe's data as the model gets them, and what the data set is like.

    Samples come out of the loader of a run in one process: its micro-batches, rows and packing. No model is made.

    Args:
        recipe: names data, tokenizer and model.
        title: what the pages call it.
        out: for ``gallery`` a ``.html`` file, or a folder for ``index.html``; for ``sample`` a folder for
            ``index.html`` and a page for each sample, ``0007.html``.
        mode: all samples on one page, or one page each.
        split: training or validation data.
        num_samples: how many to show; fewer where the data ends before.
        start: number of the first, in the order in which rows use them.
        num_counted: how many samples the summary counts, from the beginning, without reading pixels.
        show: called with how many samples of how many are done.

    Returns:
        The files, that with the summary first.

    Raises:
        ValueError: the data cannot be opened, a number is out of range, no sample can be used, or ``out`` cannot be
            written.
    """
    if num_samples < 1 or start < 0 or num_counted < 1:
        raise ValueError(
            f"--num={num_samples}, --start={start}, --count={num_counted}: must be at least 1, 0 and 1. Mend them."
        )
    source = open_source(recipe, split)
    length = len(source.dataset)
    if start >= length:
        raise ValueError(
            f"--start={start}: data.{split} has {length} usable sample(s), numbers 0 to {length - 1}. Take one of them."
        )
    index = _index_path(out, mode)
    numbers = range(start, min(start + num_samples, length))
    cards, unused = _look(source, numbers, show)
    if not any(isinstance(card, SampleCard) for card in cards):
        first = next(iter(unused.values())).skipped
        raise ValueError(
            f"data.{split}: none of the {len(cards)} sample(s) from {start} on can be used; the first: {first.key}: "
            f"{first.reason}: {first.message} Mend the data, or begin elsewhere with --start."
        )
    names = [legible(name) for name in source.names]
    writer = PageWriter(legible(title), _subtitle(source, numbers), names, source.processor.tile_size)
    written = []
    for path, text in _pages(writer, cards, _summary(source, unused, num_counted), index, mode):
        with _writing(out):
            path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def open_source(recipe: Recipe, split: Split) -> Source:
    """Open training or validation data.

    Raises:
        ValueError: the recipe has no such data, or it cannot be opened.
    """
    config = recipe.data.train if split == "train" else recipe.data.valid
    if config is None:
        raise ValueError(f"--split={split}: the recipe has no data.{split}. Name some, or use --split train.")
    processor = build_processor(recipe)
    return Source(
        recipe, split, config.build(), processor.for_training(recipe.training.seed) if split == "train" else processor
    )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Say a failure to write as the mistake in ``--out`` that it is."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out={out}: cannot be written ({error}). Choose another place.") from None


def _index_path(out: Path, mode: Mode) -> Path:
    """The page with the summary; its folder is made, and tried, before any sample is read."""
    is_file = out.suffix.lower() in _PAGE_SUFFIXES
    if is_file and mode == "sample":
        raise ValueError(f"--out={out}: --mode sample writes a folder of pages. Name a folder, or use --mode gallery.")
    path = out if is_file else out / "index.html"
    with _writing(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise ValueError(f"--out={out}: {path} is a folder. Name a file.")
    return path


def _look(
    source: Source, numbers: range, show: Callable[[int, int], None]
) -> tuple[list[Card], dict[tuple[str, str], SkippedView]]:
    """The cards of some samples, and those that cannot be used, by source and key."""
    maker = CardMaker(source.processor, source.names)
    cards: list[Card] = []
    unused: dict[tuple[str, str], SkippedView] = {}
    for micro_batch in micro_batches(source, numbers.start, numbers.stop):
        cards += maker.cards(micro_batch, numbers)
        for one in micro_batch.samples:
            if isinstance(one, UnusedSample):
                unused[one.view.source, one.view.key] = one.view
        show(len(cards), len(numbers))
    return cards, unused


def _subtitle(source: Source, numbers: range) -> str:
    recipe = source.recipe
    data, training = recipe.data, recipe.training
    packing = f"packed (buffer of {data.packing.buffer_size})" if source.is_packed and data.packing else "not packed"
    facts = [
        f"data.{source.split}, samples {numbers.start}-{numbers.stop - 1} of {len(source.dataset)} usable",
        f"fusion {recipe.model.fusion.kind}",
        f"tiling {data.tiling.kind}, {source.processor.tile_size} pixels, tags {data.tile_tags}",
        f"{source.processor.tokens_per_tile} tokens a tile",
        f"template {data.chat_template}",
        f"seq_length {data.seq_length}, {packing}",
        f"micro_batch_size {training.micro_batch_size}, global_batch_size {training.global_batch_size}",
        f"seed {training.seed}{'' if source.shuffle else ', not shuffled'}",
    ]
    return legible("; ".join(facts))


def _summary(source: Source, unused: dict[tuple[str, str], SkippedView], num_counted: int) -> PageSummary:
    """Count samples from their images' headers; what is known of pixels that were read counts too."""
    num_rows, dataset = len(source.dataset), source.dataset
    positions = range(min(num_counted, num_rows))
    counted = [unused.get((one.source, one.key), one) for one in source.counts(positions)]
    broken = {(one.source, one.key): one for one in [*counted, *unused.values()] if isinstance(one, SkippedView)}
    reasons = Counter(one.skipped.reason for one in broken.values())
    listed = [BrokenRow("", _AT_OPENING, "", legible(text)) for text in dataset.bad_rows]
    for one in broken.values():
        skipped = one.skipped
        listed.append(BrokenRow(legible(one.source), skipped.reason, legible(one.key), legible(skipped.message)))
    if dataset.num_bad_rows:
        reasons[_AT_OPENING] = dataset.num_bad_rows
    sources = [replace(one, name=legible(one.name)) for one in summarize(counted, source.names)]
    which = f"all {num_rows}" if len(positions) == num_rows else f"the first {len(positions)} of {num_rows}"
    return PageSummary(
        scope=f"Counted: as many samples as {which} usable rows, in the order of training, from text and headers of "
        "images; pixels are read of the samples below alone.",
        sources=tuple(sources),
        tiles=histogram(_added(one.tiles_per_image for one in sources)),
        lengths=histogram(_added(one.lengths for one in sources)),
        num_broken=len(broken) + dataset.num_bad_rows,
        reasons=tuple(sorted(reasons.items())),
        broken=tuple(listed[:_MOST_LISTED]),
    )


def _added(counts: Iterable[dict[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for one in counts:
        total.update(one)
    return total


def _pages(
    writer: PageWriter, cards: Sequence[Card], summary: PageSummary, index: Path, mode: Mode
) -> Iterator[tuple[Path, str]]:
    if mode == "gallery":
        yield index, writer.render(cards, {card.number: f"#s{card.number}" for card in cards}, summary=summary)
        return
    names = {card.number: f"{card.number:04d}.html" for card in cards}
    yield index, writer.render(cards, names, summary=summary, has_cards=False)
    for card in cards:
        yield index.with_name(names[card.number]), writer.render([card], names, index_address=index.name)
