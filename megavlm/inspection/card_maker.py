"""Makes the cards of samples, from the micro-batches that the model gets."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from megavlm.batch import Batch
from megavlm.data import SampleProcessor
from megavlm.data.tilings import Box
from megavlm.inspection.card import (
    NUM_TILE_COLOURS,
    ImageCard,
    RowCard,
    SampleCard,
    Stretch,
    TileBox,
    TileCard,
    TokenRunCard,
    UnusedCard,
)
from megavlm.inspection.legible import legible
from megavlm.inspection.step import MicroBatch, PlacedSample, UnusedSample
from megavlm.inspection.text import describe, losses_of, turns_of
from megavlm.inspection.thumbnail import MOST_IMAGES, MOST_TILES, image_uri, tile_uri
from megavlm.inspection.token_view import TokenView, view_tokens
from megavlm.inspection.view import ImageView, SampleView

_LONGEST_NAME = 160


class CardMaker:
    """Makes the cards of samples."""

    def __init__(self, processor: SampleProcessor, source_names: Sequence[str]) -> None:
        """Keep what made the samples, and the names of their sources."""
        self._processor = processor
        self._source_numbers = {name: number for number, name in enumerate(source_names)}
        self._tokens: dict[int, list[TokenView]] = {}

    def cards(self, micro_batch: MicroBatch, numbers: range) -> Iterator[SampleCard | UnusedCard]:
        """Make the cards of those samples of a micro-batch whose numbers are wanted."""
        self._tokens = {one.number: view_tokens(one.view, self._processor) for one in micro_batch.placed}
        for sample in micro_batch.samples:
            if sample.number in numbers:
                yield self._unused(sample) if isinstance(sample, UnusedSample) else self._card(micro_batch, sample)

    def _unused(self, sample: UnusedSample) -> UnusedCard:
        skipped = sample.view.skipped
        number = self._source_numbers[sample.view.source]
        return UnusedCard(
            sample.number,
            legible(sample.view.source),
            number,
            legible(skipped.key),
            skipped.reason,
            legible(skipped.message),
        )

    def _card(self, micro_batch: MicroBatch, sample: PlacedSample) -> SampleCard:
        view, batch, tokens = sample.view, micro_batch.batch, self._tokens[sample.number]
        num_tiles = view.sample.tiles.shape[0]
        drawn = view.images[:MOST_IMAGES]
        tiles = batch.tiles[sample.first_tile : sample.first_tile + min(num_tiles, MOST_TILES)]
        left_out = [
            f"{count - most} more {what}"
            for count, most, what in ((len(view.images), MOST_IMAGES, "images"), (num_tiles, MOST_TILES, "tiles"))
            if count > most
        ]
        return SampleCard(
            number=sample.number,
            position=sample.position,
            source=legible(view.source),
            source_number=self._source_numbers[view.source],
            key=legible(view.sample.key),
            kind=kind_of(view),
            summary=describe(view),
            turns=", ".join([turns_of(view), *losses_of(view)]),
            start=sample.start,
            stop=sample.stop,
            row=self._row(micro_batch, sample),
            images=tuple(_image(image, self._processor.config.max_image_pixels, len(drawn)) for image in drawn),
            tiles=tuple(_tiles(view, tiles)),
            runs=tuple(_runs(tokens)),
            left_out=", ".join(left_out),
            counts=_counts(view, tokens),
            facts=facts_of(batch, sample),
        )

    def _row(self, micro_batch: MicroBatch, sample: PlacedSample) -> RowCard:
        batch, row = micro_batch.batch, sample.row
        length = batch.tokens.shape[1]
        filled = int(batch.row_lengths[row])
        beside = [one for one in micro_batch.placed if one.row == row]
        samples = [
            Stretch(
                one.start,
                one.stop,
                "here" if one is sample else "other",
                f"sample {one.number}: {legible(one.view.sample.key)}",
                one.number,
            )
            for one in beside
        ]
        categories: list[str] = [token.category for one in beside for token in self._tokens[one.number]]
        losses = ["loss" if weight else "" for weight in (batch.loss_mask[row] > 0).tolist()]
        return RowCard(
            micro_batch.step,
            micro_batch.number,
            row,
            batch.tokens.shape[0],
            length,
            length - filled,
            tuple(samples),
            tuple(_stretches([*categories, *["padding"] * (length - filled)])),
            tuple(one for one in _stretches(losses) if one.what),
        )


def kind_of(view: SampleView) -> str:
    """What kind of sample it is, for a filter."""
    num_images = len(view.images)
    if view.conversation.is_document:
        return "interleaved document" if num_images else "text document"
    return ("text chat", "chat with one image")[num_images] if num_images < 2 else "chat with several images"


def facts_of(batch: Batch, sample: PlacedSample) -> dict[str, Any]:
    """What a position of a sample is, as the batch has it.

    Returns:
        ``ids`` and ``labels`` (0 where there is no loss) of each position; ``position``: of the first, in the batch's
        ``position_ids``; ``weights``: ``[place, weight of the loss]`` and ``visible``: ``[place, first tile, tile
        behind the last]``, each from that place on, until the next; ``tiles``: ``[tokens in the context, first
        position, position behind the last]`` of each tile, the positions being those of its image tokens.
    """
    places = slice(sample.start, sample.stop)
    weights = [[round(weight, 6)] for weight in batch.loss_mask[sample.row, places].tolist()]
    visible = (batch.visible_tiles[sample.row, places] - sample.first_tile).tolist()
    tiles = slice(sample.first_tile, sample.first_tile + sample.view.sample.tiles.shape[0])
    spans = sample.view.sample.tile_spans.tolist()
    return {
        "ids": batch.tokens[sample.row, places].tolist(),
        "labels": batch.labels[sample.row, places].tolist(),
        "position": int(batch.position_ids[sample.row, sample.start]),
        "weights": _changes(weights),
        "visible": _changes(visible),
        "tiles": [[length, *span] for length, span in zip(batch.tile_context[tiles].tolist(), spans, strict=True)],
    }


def _changes(values: Iterable[list[Any]]) -> list[list[Any]]:
    """Each value that is another than the one before it, behind its place."""
    found: list[list[Any]] = []
    for place, value in enumerate(values):
        if not found or found[-1][1:] != value:
            found.append([place, *value])
    return found


def _image(image: ImageView, max_pixels: int, num_images: int) -> ImageCard:
    grid = f"{image.layout.columns} x {image.layout.rows} tiles{' + thumbnail' if image.layout.has_thumbnail else ''}"
    notes = [f"{image.size[0]} x {image.size[1]} pixels", grid]
    if image.is_degraded:
        notes.append("degraded: fewer tiles, so that the sample fits")
    name = "inside the sample" if image.source.startswith("data:") else legible(image.source)
    return ImageCard(
        image_uri(image.source, max_pixels, num_images),
        *image.size,
        name if len(name) <= _LONGEST_NAME else f"...{name[-_LONGEST_NAME:]}",
        ", ".join(notes),
        tuple(_boxes(image)),
    )


def _boxes(image: ImageView) -> Iterator[TileBox]:
    for number, (left, top, right, bottom) in enumerate(image.boxes):
        if image.layout.num_tiles > 1 and image.layout.is_whole_image(number):
            continue
        inset = _inset(image.boxes[number], max(image.size), number)
        yield TileBox(
            image.first_tile + number,
            number % NUM_TILE_COLOURS,
            left + inset,
            top + inset,
            max(0.0, right - left - 2 * inset),
            max(0.0, bottom - top - 2 * inset),
        )


def _inset(box: Box, longest_side: int, number: int) -> float:
    """Tiles may overlap: no border hides another."""
    return min(0.004 * longest_side * (1 + number % 3), 0.2 * min(box[2] - box[0], box[3] - box[1]))


def _tiles(view: SampleView, tiles: Tensor) -> Iterator[TileCard]:
    spans = view.sample.tile_spans.tolist()
    context = view.sample.tile_context.tolist()
    colours = [number % NUM_TILE_COLOURS for image in view.images for number in range(image.layout.num_tiles)]
    tags = [tag for image in view.images for tag in image.tags]
    for number, tile in enumerate(tiles):
        first, stop = spans[number]
        route = f"cross-attention, {context[number]} tokens" if context[number] else f"positions {first}-{stop - 1}"
        uri = tile_uri(tile, view.sample.tiles.shape[0])
        yield TileCard(number, colours[number], uri, legible(tags[number]) or "no tag", route)


def _runs(tokens: Sequence[TokenView]) -> Iterator[TokenRunCard]:
    for (category, message, is_trained, tile), group in groupby(
        tokens, key=lambda one: (one.category, one.message, one.is_trained, one.tile)
    ):
        members = list(group)
        texts = () if category == "image" else tuple(_spelled(one.text) for one in members)
        yield TokenRunCard(category, message, is_trained, tile, len(members), texts)


def _spelled(text: str) -> str:
    """A token's text: a line break shows as a sign, and breaks the line too; a part of a character as a dot."""
    return "\u21b5\n".join(legible(line) for line in text.split("\n")) if text else "\u00b7"


def _stretches(names: Iterable[str]) -> Iterator[Stretch]:
    """One for each run of equal names."""
    start = 0
    for name, group in groupby(names):
        stop = start + sum(1 for _ in group)
        yield Stretch(start, stop, name)
        start = stop


def _counts(view: SampleView, tokens: Sequence[TokenView]) -> dict[str, int]:
    categories = [token.category for token in tokens]
    counts = {
        "tokens": len(tokens),
        "trained": view.sample.num_trained_tokens,
        "tiles": view.sample.tiles.shape[0],
    }
    if view.images:
        counts |= {
            "images": len(view.images),
            "image tokens": categories.count("image"),
            "tag tokens": categories.count("tag"),
        }
    if num_context_tokens := int(view.sample.tile_context.sum()):
        counts["context tokens"] = num_context_tokens
    return counts
