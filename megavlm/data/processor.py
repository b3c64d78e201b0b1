"""Makes a sample of a conversation: reads its images, fits its tiles into the sequence, expands its tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.batch import ALL_AMONG_TOKENS, SkippedSample, TileRoute
from megavlm.data.chat_template import CHAT_TEMPLATES, Segment, Special, render, render_prompt
from megavlm.data.config import DataConfig
from megavlm.data.conversation import Conversation, ImageRef
from megavlm.data.expansion import (
    ImageSlot,
    ImageTokens,
    TokenRun,
    count_tokens,
    encode_segments,
    expand,
    route_image,
    special_token_id,
)
from megavlm.data.image import ImageError, load_image, read_image_size
from megavlm.data.sample import Prompt, Sample, SampleError
from megavlm.data.tile_tag import tile_tags
from megavlm.data.tilings import TileLayout
from megavlm.data.tokenizers import Tokenizer


@dataclass
class _PlannedImage:
    """An image whose pixels are not yet read."""

    source: str
    size: tuple[int, int]
    layout: TileLayout
    tokens: ImageTokens
    is_degraded: bool = False


class SampleProcessor:
    """Turns conversations into samples. Has no state that changes, so workers may each have a copy."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        tile_size: int,
        tokens_per_tile: int,
        route: TileRoute = ALL_AMONG_TOKENS,
    ) -> None:
        """Build the tiling and check that the parts fit each other.

        Args:
            config: the ``data`` part of the recipe.
            tokenizer: of the language model.
            tile_size: side of a tile, in pixels (the vision encoder's image size).
            tokens_per_tile: tokens that the connector gives for a tile.
            route: how the model takes an image's tiles.

        Raises:
            ValueError: the tokenizer lacks a special token of the chat template, or no tile fits ``seq_length``.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.tile_size = tile_size
        self.tokens_per_tile = tokens_per_tile
        self.route = route
        self.tiling = config.tiling.build(tile_size)
        self._template = CHAT_TEMPLATES[config.chat_template]
        for special in self._template.specials:
            special_token_id(special, tokenizer)
        if route.context_tiles != "all" and config.seq_length <= tokens_per_tile:
            raise ValueError(
                f"data.seq_length={config.seq_length}: holds no whole tile; model.vision and model.connector give "
                f"{tokens_per_tile} tokens a tile. Raise seq_length or shrink the tile's tokens."
            )

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the end of text, and what the template writes after the assistant."""
        ends = [piece for piece in self._template.assistant_suffix if isinstance(piece, Special)]
        return frozenset([self.tokenizer.eos_id, *(special_token_id(piece, self.tokenizer) for piece in ends[:1])])

    def __call__(self, key: str, conversation: Conversation) -> Sample:
        """Make the training sample of a conversation.

        Args:
            key: names the sample in errors, ``file.jsonl:17``.
            conversation: ends with the assistant.

        Raises:
            SampleError: an image cannot be used (reasons of :class:`megavlm.data.image.ImageError`), or the sample is
                too long with every image at its fewest tiles (``over_length``).
        """
        segments = render(self._template, conversation, self.config.system_prompt)
        return self._make(key, segments)

    def prompt(self, key: str, conversation: Conversation) -> Prompt:
        """Make what a model is given to write the last assistant turn.

        Args:
            key: names the sample in errors.
            conversation: ends with the assistant, whose text becomes the reference, or with the user.

        Raises:
            SampleError: as for a training sample.
        """
        last = conversation.messages[-1]
        segments = render_prompt(self._template, conversation, self.config.system_prompt)
        return Prompt(self._make(key, segments), last.text if last.role == "assistant" else "")

    def image_tokens(self, layout: TileLayout, image_size: tuple[int, int]) -> ImageTokens:
        """Return the tokens that stand for an image.

        Args:
            layout: its tiles.
            image_size: ``(width, height)`` in pixels.
        """
        tags = tile_tags(
            self.config.tile_tags,
            layout,
            image_size,
            max_tiles=self.tiling.max_tiles,
            thumbnail_tag=self.config.thumbnail_tag,
        )
        tag_ids = [tuple(self.tokenizer.encode(tag)) if tag else () for tag in tags]
        return route_image(tag_ids, layout, self.tokens_per_tile, self.route)

    def _make(self, key: str, segments: list[Segment]) -> Sample:
        runs = encode_segments(segments, self.tokenizer, self.config.image_wrapper)
        try:
            sources = [segment.content.source for segment in segments if isinstance(segment.content, ImageRef)]
            images = [self._plan(source) for source in sources]
            self._fit(key, runs, images)
            tiles = self._cut(images)
        except ImageError as error:
            raise SampleError(SkippedSample(key, error.reason, error.message)) from None
        expansion = expand(
            runs, [image.tokens for image in images], self.tokenizer.image_token_id, self.route.text_sees
        )
        return Sample(
            key=key,
            tokens=expansion.tokens,
            labels=expansion.labels,
            loss_mask=expansion.loss_mask,
            visible_tiles=expansion.visible_tiles,
            tile_spans=expansion.tile_spans,
            tile_context=expansion.tile_context,
            tile_tags=expansion.tile_tags,
            tiles=tiles,
            tiles_per_image=torch.tensor([image.layout.num_tiles for image in images], dtype=torch.int64),
            tokens_per_image=expansion.tokens_per_image,
            num_degraded=sum(image.is_degraded for image in images),
        )

    def _plan(self, source: str) -> _PlannedImage:
        size = read_image_size(source, self.config.max_image_pixels)
        layout = self.tiling.layout(*size)
        return _PlannedImage(source, size, layout, self.image_tokens(layout, size))

    def _fit(self, key: str, runs: list[TokenRun | ImageSlot], images: list[_PlannedImage]) -> None:
        """Take tiles from the image that has most, step by step, until the sample fits; changes ``images``.

        The steps are those of Megatron-LM, which takes them for all images of a sample at once. Tiles of the context
        are only taken where that makes the text shorter (their tags).
        """
        limit = self.config.seq_length
        while (length := count_tokens(runs, [image.tokens for image in images])) > limit:
            for image in sorted(images, key=lambda image: image.layout.num_tiles, reverse=True):
                if self._degrade(image):
                    break
            else:
                num_image_tokens = sum(image.tokens.num_tokens for image in images)
                message = (
                    f"{length} tokens ({length - num_image_tokens} of text, {num_image_tokens} of {len(images)} "
                    f"image(s), which cannot take fewer) do not fit data.seq_length={limit}."
                )
                raise SampleError(SkippedSample(key, "over_length", message))

    def _degrade(self, image: _PlannedImage) -> bool:
        """Give an image fewer tiles, as many steps as it takes to make its text shorter; False if none does."""
        layout = self.tiling.degrade(image.layout, *image.size)
        while layout is not None:
            tokens = self.image_tokens(layout, image.size)
            if tokens.num_tokens < image.tokens.num_tokens:
                image.layout, image.tokens, image.is_degraded = layout, tokens, True
                return True
            layout = self.tiling.degrade(layout, *image.size)
        return False

    def _cut(self, images: list[_PlannedImage]) -> Tensor:
        tiles = [torch.empty(0, 3, self.tile_size, self.tile_size, dtype=torch.uint8)]
        for image in images:
            tiles.append(self.tiling.cut(load_image(image.source, self.config.max_image_pixels), image.layout))
        return torch.cat(tiles)
