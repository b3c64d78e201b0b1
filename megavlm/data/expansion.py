"""The one place where a conversation's tokens and its image tiles are put together, and where they are counted.

Whoever needs a number of tokens asks here. Shape letters: S tokens, T tiles, I images.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megavlm.batch import TileRoute
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.sample import Sample
from megavlm.data.tilings import TileLayout

TextSees = Literal["all_images", "last_image", "next_image"]
"""The images that text sees by cross-attention: those before it in its sample, the last of them, or the one behind."""

LossWeighting = Literal["token", "sample", "square_root"]
"""How much a token's loss counts: all alike; so that each turn counts alike; or as the square root of its turn's length
(InternVL 2.5, arXiv 2412.05271: token, sample and square averaging)."""

_WEIGHTING_POWERS: dict[LossWeighting, float] = {"token": 0.0, "sample": -1.0, "square_root": -0.5}


@dataclass(frozen=True)
class TileTokens:
    """The tokens of one tile, by the path that they take."""

    tag_ids: tuple[int, ...]
    """Of the tag before the tile, in the text; may be empty."""
    num_image_tokens: int
    """Placeholders in the text, behind the tag; 0 for a tile that is read by cross-attention."""
    context_length: int = 0
    """Tokens in the context; 0 for a tile whose features stand among the tokens."""
    context_tag_ids: tuple[int, ...] = ()
    """Of the tag that goes into the context with the tile."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the text: tag and image tokens."""
        return len(self.tag_ids) + self.num_image_tokens


def route_tile(tag_ids: tuple[int, ...], tokens_per_tile: int, route: TileRoute, *, is_whole_image: bool) -> TileTokens:
    """Say which tokens a tile gets on its path into the model.

    Args:
        tag_ids: of its tag; may be empty.
        tokens_per_tile: tokens that the connector gives for a tile.
        route: how the model takes tiles.
        is_whole_image: the tile is the thumbnail, or the only one of its image.
    """
    if route.context_tiles == "none" or (route.context_tiles == "regular" and is_whole_image):
        return TileTokens(tag_ids, tokens_per_tile)
    if route.context_tags == "text":
        return TileTokens(tag_ids, 0, tokens_per_tile)
    num_more = len(tag_ids) if route.context_tags == "concatenate" else 0
    return TileTokens((), 0, tokens_per_tile + num_more, tag_ids)


@dataclass(frozen=True)
class ImageTokens:
    """The tokens that stand for one image."""

    tiles: tuple[TileTokens, ...]
    closing_ids: tuple[int, ...] = ()
    """Of the text behind the last tile; may be empty."""

    @property
    def num_tokens(self) -> int:
        """Tags, image tokens and closing text together; the wrapper's tokens are text and not counted."""
        return sum(tile.num_tokens for tile in self.tiles) + len(self.closing_ids)

    @property
    def uses_context(self) -> bool:
        """Whether any tile is read by cross-attention."""
        return any(tile.context_length for tile in self.tiles)


@dataclass(frozen=True)
class Expansion:
    """A sample's tokens and everything that follows from them."""

    tokens: Tensor
    """``[S]`` int64."""
    labels: Tensor
    """``[S]`` int64: the next token where it is trained, else 0."""
    loss_mask: Tensor
    """``[S]`` float32: weight of the next token's loss; 0 where it is not trained."""
    visible_tiles: Tensor
    """``[S, 2]`` int64: half-open range of the sample's tiles that each token may see by cross-attention."""
    tile_spans: Tensor
    """``[T, 2]`` int64: half-open range of each tile's image tokens; empty for a tile of the context."""
    tile_context: Tensor
    """``[T]`` int64: tokens of each tile in the context."""
    tile_tags: Tensor
    """``[T, G]`` int64: ids of the tag that goes into the context with each tile, -1 behind its end."""
    tokens_per_image: tuple[int, ...]
    """Tags and image tokens of each image."""

    def with_tiles(self, key: str, tiles: Tensor, tiles_per_image: Sequence[int]) -> Sample:
        """The sample that it is part of.

        Args:
            key: names the sample.
            tiles: ``[T, 3, H, W]`` uint8, RGB.
            tiles_per_image: how many of them each image has.
        """
        return Sample(
            key=key,
            tokens=self.tokens,
            labels=self.labels,
            loss_mask=self.loss_mask,
            visible_tiles=self.visible_tiles,
            tile_spans=self.tile_spans,
            tile_context=self.tile_context,
            tile_tags=self.tile_tags,
            tiles=tiles,
            tiles_per_image=torch.tensor(tiles_per_image, dtype=torch.int64),
            tokens_per_image=self.tokens_per_image,
        )


def route_image(
    tag_ids: Sequence[tuple[int, ...]],
    layout: TileLayout,
    tokens_per_tile: int,
    route: TileRoute,
    closing_ids: tuple[int, ...] = (),
) -> ImageTokens:
    """Say which tokens an image gets, tile by tile (:func:`route_tile`).

    Args:
        tag_ids: of each tile's tag.
        layout: its tiles.
        tokens_per_tile: tokens that the connector gives for a tile.
        route: how the model takes tiles.
        closing_ids: of the text behind the last tile.
    """
    tiles = tuple(
        route_tile(tag, tokens_per_tile, route, is_whole_image=layout.is_whole_image(tile))
        for tile, tag in enumerate(tag_ids)
    )
    return ImageTokens(tiles, closing_ids)


def count_tokens(runs: Sequence[TokenRun | ImageSlot], images: Sequence[ImageTokens]) -> int:
    """Return S, the number of tokens that :func:`expand` will give."""
    num_text_tokens = sum(len(run.ids) for run in runs if isinstance(run, TokenRun))
    return num_text_tokens + sum(image.num_tokens for image in images)


def expand(
    runs: Sequence[TokenRun | ImageSlot],
    images: Sequence[ImageTokens],
    image_token_id: int,
    text_sees: TextSees = "all_images",
    loss_weighting: LossWeighting = "token",
) -> Expansion:
    """Put the images' tokens into their slots.

    Tags and image tokens are not trained, and so the position before them predicts nothing. What a token may see by
    cross-attention: a tile's tag sees that tile; so do its image tokens, unless other tiles of their image are in the
    context: then (the thumbnail of NVLM-H) they see those. Text sees what ``text_sees`` says of the images of its
    sample, and nothing (an empty range) where there is none. Sources: NVLM (arXiv 2409.11402) section 4.3 for tags,
    Flamingo (arXiv 2204.14198) section 2.3 for ``last_image`` and appendix A.3.2 for ``next_image``; NVLM names no rule
    for other text, nor for the thumbnail.

    Args:
        runs: of :func:`encode_segments`.
        images: one for each slot.
        image_token_id: what stands at the positions of image features.
        text_sees: which images a token of text may see.
        loss_weighting: how much a token's loss counts.

    Raises:
        ValueError: the number of slots is not the number of images.
    """
    num_slots = sum(isinstance(run, ImageSlot) for run in runs)
    if num_slots != len(images):
        raise ValueError(f"images={len(images)}: the rendered conversation has {num_slots} image slot(s).")
    ids: list[int] = []
    weights: list[float] = []  # 0: not trained
    turns: list[int] = []
    visible: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    ends = list(itertools.accumulate((len(image.tiles) for image in images), initial=0))
    seen_by_text = _tiles_of_text(text_sees, ends, 0)
    num_before = 0
    for run in runs:
        if isinstance(run, TokenRun):
            ids += run.ids
            weights += [run.weight if run.is_trained else 0.0] * len(run.ids)
            turns += [run.turn] * len(run.ids)
            visible += [seen_by_text] * len(run.ids)
            continue
        image = images[num_before]
        all_of_image = (ends[num_before], ends[num_before + 1])
        num_before += 1
        for tile in image.tiles:
            this_tile = (len(spans), len(spans) + 1)
            visible += [this_tile] * len(tile.tag_ids)
            visible += [all_of_image if image.uses_context else this_tile] * tile.num_image_tokens
            spans.append((len(ids) + len(tile.tag_ids), len(ids) + tile.num_tokens))
            ids += [*tile.tag_ids, *[image_token_id] * tile.num_image_tokens]
        seen_by_text = _tiles_of_text(text_sees, ends, num_before)
        visible += [seen_by_text] * len(image.closing_ids)
        ids += image.closing_ids
        weights += [0.0] * image.num_tokens
        turns += [0] * image.num_tokens
    tokens = torch.tensor(ids, dtype=torch.int64)
    loss_mask = _loss_mask(weights, turns, loss_weighting)
    tiles = [tile for image in images for tile in image.tiles]
    return Expansion(
        tokens=tokens,
        labels=torch.where(loss_mask > 0, tokens.roll(-1), 0),
        loss_mask=loss_mask,
        visible_tiles=torch.tensor(visible, dtype=torch.int64).reshape(-1, 2),
        tile_spans=torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
        tile_context=torch.tensor([tile.context_length for tile in tiles], dtype=torch.int64),
        tile_tags=_padded([tile.context_tag_ids for tile in tiles]),
        tokens_per_image=tuple(image.num_tokens for image in images),
    )


def _tiles_of_text(text_sees: TextSees, ends: Sequence[int], num_before: int) -> tuple[int, int]:
    """The tiles that text behind ``num_before`` images sees; ``ends``: 0, and where the tiles of each image end."""
    if text_sees == "next_image":
        return (ends[num_before], ends[num_before + 1]) if num_before + 1 < len(ends) else (0, 0)
    if num_before == 0 or text_sees == "all_images":
        return (0, ends[num_before])
    return (ends[num_before - 1], ends[num_before])


def _loss_mask(weights: Sequence[float], turns: Sequence[int], weighting: LossWeighting) -> Tensor:
    """``[S]`` float32: each position's weight is that of the token behind it, by the trained length of its turn."""
    of_next = torch.tensor([*weights[1:], 0.0][: len(weights)], dtype=torch.float64)
    turn_of_next = torch.tensor([*turns[1:], 0][: len(turns)], dtype=torch.int64)
    lengths = torch.bincount(turn_of_next[of_next > 0], minlength=max(turns, default=0) + 1).clamp(min=1)
    scale = lengths.to(torch.float64) ** _WEIGHTING_POWERS[weighting]
    return (of_next * scale[turn_of_next]).to(torch.float32)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """``[T, G]`` int64 of rows of ids, -1 behind the end of each."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int64).reshape(
        len(rows), longest
    )
