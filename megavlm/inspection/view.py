"""What a sample is made of, told apart: which token stands for what, which tile shows what. Loads no model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from megavlm.batch import SkippedSample
from megavlm.data import Conversation, Sample, SampleError, SampleProcessor, Tokenizer
from megavlm.data.blend import order_of, source_of
from megavlm.data.datasets import Dataset
from megavlm.data.encoding import ImageSlot
from megavlm.data.fitting import SamplePlan
from megavlm.data.tilings import Box, TileLayout

TokenKind = Literal["trained", "text", "tag", "image"]
"""``trained``: the model learns to write it; ``tag``: names a tile; ``image``: holds a feature; ``text``: the rest."""

TOKEN_KINDS: tuple[TokenKind, ...] = ("trained", "text", "tag", "image")


@dataclass(frozen=True)
class ImageView:
    """An image and its tiles."""

    source: str
    size: tuple[int, int]
    """Width and height in pixels."""
    layout: TileLayout
    boxes: tuple[Box, ...]
    """What each tile shows of it."""
    tags: tuple[str, ...]
    """The text of each tile's tag; empty where it has none."""
    first_tile: int
    """Number of its first tile in the sample."""
    is_degraded: bool
    """Whether it got fewer tiles than its tiling chose, so that the sample fits."""


@dataclass(frozen=True)
class Span:
    """Tokens of one kind, one behind the other."""

    kind: TokenKind
    start: int
    stop: int
    text: str
    tile: int | None = None
    """Number of the tile in the sample, of tags and image tokens."""


@dataclass(frozen=True)
class SampleView:
    """A sample, and where its tokens come from."""

    source: str
    """Name of the data source."""
    conversation: Conversation
    sample: Sample
    images: tuple[ImageView, ...]
    spans: tuple[Span, ...]
    plan: SamplePlan
    """What its tokens and tiles were decided on."""

    def kinds(self) -> list[TokenKind]:
        """The kind of each token."""
        return [span.kind for span in self.spans for _ in range(span.start, span.stop)]


@dataclass(frozen=True)
class SkippedView:
    """A sample that cannot be used, and why."""

    source: str
    skipped: SkippedSample

    @property
    def key(self) -> str:
        """Which one, as a person can find it."""
        return self.skipped.key


def view_samples(
    dataset: Dataset,
    source_names: Sequence[str],
    processor: SampleProcessor,
    positions: Sequence[int],
    seed: int,
    shuffle: bool,
) -> Iterator[SampleView | SkippedView]:
    """Look at the samples that training uses at some positions.

    Args:
        dataset: one, or a blend.
        source_names: of the blend's sources, or of the only one.
        processor: of the recipe.
        positions: in the endless sequence of samples.
        seed: of the recipe.
        shuffle: of the recipe.
    """
    order = order_of(dataset, seed, shuffle)
    for position in positions:
        row = order.row(position)
        source = source_names[source_of(dataset, row)]
        try:
            key, conversation = dataset[row]
        except ValueError as error:
            yield SkippedView(source, SkippedSample(f"row {row}", "row_malformed", str(error)))
            continue
        try:
            yield view_sample(processor, source, key, conversation)
        except SampleError as error:
            yield SkippedView(source, error.skipped)


def view_sample(processor: SampleProcessor, source: str, key: str, conversation: Conversation) -> SampleView:
    """Make the training sample of a conversation, and tell its tokens apart.

    Raises:
        SampleError: as the processor.
    """
    plan = processor.plan(key, conversation)
    sample = processor(key, conversation)
    spans = tuple(_joined(_spans(plan, sample, processor.tokenizer)))
    assert (spans[-1].stop if spans else 0) == sample.num_tokens, key
    return SampleView(source, conversation, sample, tuple(_images(plan, processor)), spans, plan)


def _images(plan: SamplePlan, processor: SampleProcessor) -> Iterator[ImageView]:
    first = 0
    for image in plan.images:
        yield ImageView(
            image.source,
            image.size,
            image.layout,
            tuple(processor.tiling.boxes(image.layout, *image.size)),
            tuple(
                processor.tokenizer.decode(list(tile.tag_ids or tile.context_tag_ids)) for tile in image.tokens.tiles
            ),
            first,
            image.is_degraded,
        )
        first += image.layout.num_tiles


def _spans(plan: SamplePlan, sample: Sample, tokenizer: Tokenizer) -> Iterator[Span]:
    tiles = iter(plan.images)
    start = first_tile = 0
    for run in plan.runs:
        if not isinstance(run, ImageSlot):
            yield from _text_spans(run.ids, start, sample, tokenizer)
            start += len(run.ids)
            continue
        image = next(tiles)
        for number, tile in enumerate(image.tokens.tiles, start=first_tile):
            for kind, length in (("tag", len(tile.tag_ids)), ("image", tile.num_image_tokens)):
                if length:
                    text = tokenizer.decode(list(tile.tag_ids)) if kind == "tag" else ""
                    yield Span(kind, start, start + length, text, number)  # type: ignore[arg-type]
                start += length
        if closing := image.tokens.closing_ids:
            yield Span("tag", start, start + len(closing), tokenizer.decode(list(closing)))
            start += len(closing)
        first_tile += len(image.tokens.tiles)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """One span for neighbours that are both trained, or both other text."""
    last: Span | None = None
    for span in spans:
        if last is not None and last.kind == span.kind and span.kind in ("trained", "text"):
            last = replace(last, stop=span.stop, text=last.text + span.text)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _text_spans(ids: Sequence[int], first: int, sample: Sample, tokenizer: Tokenizer) -> Iterator[Span]:
    """Spans of trained and other text. A token is trained where the position before it has a loss."""
    trained = [position > 0 and bool(sample.loss_mask[position - 1] > 0) for position in range(first, first + len(ids))]
    start = first
    for is_trained, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        piece = [token for token, _ in group]
        yield Span("trained" if is_trained else "text", start, start + len(piece), _spelled(piece, tokenizer))
        start += len(piece)


def _spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens, special ones by their number."""
    text = ""
    for is_special, group in groupby(ids, key=lambda token: _is_special(token, tokenizer)):
        piece = list(group)
        text += "".join(f"<#{token}>" for token in piece) if is_special else tokenizer.decode(piece)
    return text


def _is_special(token: int, tokenizer: Tokenizer) -> bool:
    # two of them: a byte of a character gives no text by itself, and a first space is none
    return tokenizer.decode([token, token]) == ""
