"""Makes a sample of a conversation: reads its images, fits its tiles into the sequence, expands its tokens."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavlm.batch import ALL_AMONG_TOKENS, SkippedSample, TileRoute
from megavlm.data.chat_template import CHAT_TEMPLATES, Segment, Special, render, render_prompt
from megavlm.data.config import DataConfig
from megavlm.data.conversation import Conversation, ImageRef
from megavlm.data.encoding import encode_segments, special_token_id
from megavlm.data.expansion import ImageTokens, TextSees, expand, route_image
from megavlm.data.fitting import Fitter, OverLengthError, OverLengthPolicy, PlannedImage, SamplePlan
from megavlm.data.image import ImageError, load_image, read_image_size
from megavlm.data.sample import Prompt, Sample, SampleError
from megavlm.data.tile_tag import closing_text, tile_tags
from megavlm.data.tilings import TileLayout
from megavlm.data.tilings.layout import WHOLE
from megavlm.data.tokenizers import Tokenizer


class SampleProcessor:
    """Turns conversations into samples. Has no state that changes, so workers may each have a copy."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        tile_size: int,
        tokens_per_tile: int,
        route: TileRoute = ALL_AMONG_TOKENS,
        *,
        pairs_only: bool = False,
    ) -> None:
        """Build the tiling and check that the parts fit each other.

        Args:
            config: the ``data`` part of the recipe.
            tokenizer: of the language model.
            tile_size: side of a tile, in pixels (the vision encoder's image size).
            tokens_per_tile: tokens that the connector gives for a tile.
            route: how the model takes an image's tiles.
            pairs_only: whether a sample is an image of one tile and its caption; others cannot be used.

        Raises:
            ValueError: the tokenizer lacks a special token of the chat template, or no tile fits ``seq_length``.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.tile_size = tile_size
        self.tokens_per_tile = tokens_per_tile
        self.route = route
        self.pairs_only = pairs_only
        self._seed: int | None = None
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

    @property
    def stop_text(self) -> str:
        """The text that ends an answer where the template has no special symbol for that; otherwise nothing."""
        return self._template.stop_text

    def __call__(self, key: str, conversation: Conversation) -> Sample:
        """Make the training sample of a conversation.

        Args:
            key: names the sample in errors, ``file.jsonl:17``.
            conversation: ends with the assistant.

        Raises:
            SampleError: an image cannot be used (reasons of :class:`megavlm.data.image.ImageError`), or the sample is
                too long with every image at its fewest tiles (``over_length``), or is no pair and must be one
                (``not_a_pair``).
        """
        return self._make(key, self.plan(key, conversation), self._text_sees(key, conversation))

    def for_training(self, seed: int) -> "SampleProcessor":
        """Return one that draws which images the text of a document sees (``data.next_image_probability``).

        What is drawn depends on the seed and on what ``key`` says behind its last ``/``, and on nothing else: it is the
        same in every epoch, on every rank, and in a run that is resumed.
        """
        drawing = copy.copy(self)
        drawing._seed = seed
        return drawing

    def measure(self, key: str, conversation: Conversation) -> tuple[int, int]:
        """Return how many tokens and tiles the training sample of a conversation has, from its images' headers.

        Raises:
            SampleError: as for the sample itself, as far as headers tell.
        """
        plan = self.plan(key, conversation)
        return plan.num_tokens, plan.num_tiles

    def plan(self, key: str, conversation: Conversation) -> SamplePlan:
        """Decide on the tokens and tiles of the training sample of a conversation, from its images' headers.

        Raises:
            SampleError: as for the sample itself, as far as headers tell.
        """
        segments = render(self._template, conversation, self.config.system_prompt)
        return self._fit(key, segments, self.config.over_length)

    def prompt(self, key: str, conversation: Conversation) -> Prompt:
        """Make what a model is given to write the last assistant turn.

        Args:
            key: names the sample in errors.
            conversation: ends with the assistant, whose text becomes the reference, or with the user; or a document,
                whose text behind the last image becomes the reference.

        Raises:
            SampleError: as for a training sample; a prompt that is too long is never cut.
        """
        segments = render_prompt(self._template, conversation, self.config.system_prompt)
        plan = self._fit(key, segments, "skip")
        return Prompt(self._make(key, plan, self.route.text_sees), _reference(conversation))

    def image_tokens(self, layout: TileLayout, image_size: tuple[int, int], image_index: int = 0) -> ImageTokens:
        """Return the tokens that stand for an image.

        Args:
            layout: its tiles.
            image_size: ``(width, height)`` in pixels.
            image_index: number of the image in its sample.
        """
        tags = tile_tags(
            self.config.tile_tags,
            layout,
            image_size,
            max_tiles=self.tiling.max_tiles,
            thumbnail_tag=self.config.thumbnail_tag,
            boxes=self.tiling.boxes(layout, *image_size),
            image_index=image_index,
        )
        closing = closing_text(self.config.tile_tags, layout)
        tag_ids = [tuple(self.tokenizer.encode(tag)) if tag else () for tag in tags]
        closing_ids = tuple(self.tokenizer.encode(closing)) if closing else ()
        return route_image(tag_ids, layout, self.tokens_per_tile, self.route, closing_ids)

    def _text_sees(self, key: str, conversation: Conversation) -> TextSees:
        """Which images the text of a training sample sees. Flamingo (arXiv 2204.14198), appendix A.3.2."""
        probability = self.config.next_image_probability
        if self._seed is None or not conversation.is_document or probability == 0.0:
            return self.route.text_sees
        digest = hashlib.blake2b(f"{self._seed}:{key.rpartition('/')[2]}".encode(), digest_size=8).digest()
        is_next = int.from_bytes(digest, "big") < probability * 2**64
        return "next_image" if is_next else self.route.text_sees

    def _make(self, key: str, plan: SamplePlan, text_sees: TextSees) -> Sample:
        try:
            tiles = self._cut(plan.images)
        except ImageError as error:
            raise SampleError(SkippedSample(key, error.reason, error.message)) from None
        expansion = expand(
            plan.runs,
            [image.tokens for image in plan.images],
            self.tokenizer.image_token_id,
            text_sees,
            self.config.loss_weighting,
        )
        return replace(
            expansion.with_tiles(key, tiles, [image.layout.num_tiles for image in plan.images]),
            num_degraded=sum(image.is_degraded for image in plan.images),
            num_dropped_images=plan.num_dropped_images,
            is_cut=plan.is_cut,
        )

    def _fit(self, key: str, segments: Sequence[Segment], policy: OverLengthPolicy) -> SamplePlan:
        """Decide on a sample's tokens and tiles. Of its images only the headers are read."""
        sizes: dict[str, tuple[int, int]] = {}
        fitter = Fitter(
            max_tokens=self.config.seq_length,
            max_tiles=self.config.max_tiles_per_sample,
            policy=policy,
            plan=lambda some: self._plan(some, sizes),
            smaller=self._smaller,
        )
        try:
            plan = fitter.fit(segments)
        except ImageError as error:
            raise SampleError(SkippedSample(key, error.reason, error.message)) from None
        except OverLengthError as error:
            raise SampleError(SkippedSample(key, "over_length", str(error))) from None
        if self.pairs_only and plan.num_tiles != 1:
            raise SampleError(
                SkippedSample(key, "not_a_pair", f"has {plan.num_tiles} tiles; a pair is one tile and its caption")
            )
        return plan

    def _plan(self, segments: Sequence[Segment], sizes: dict[str, tuple[int, int]]) -> SamplePlan:
        """Encode segments and choose the layouts of their images; ``sizes`` keeps what was read of their headers."""
        sources = [segment.content.source for segment in segments if isinstance(segment.content, ImageRef)]
        images = []
        for index, source in enumerate(sources):
            if source not in sizes:
                sizes[source] = read_image_size(source, self.config.max_image_pixels)
            is_split = self._is_split(index, len(sources))
            layout = self.tiling.layout(*sizes[source]) if is_split else WHOLE
            tokens = self.image_tokens(layout, sizes[source], index)
            images.append(PlannedImage(source, sizes[source], index, layout, tokens))
        return SamplePlan(segments, encode_segments(segments, self.tokenizer, self.config.image_wrapper), images)

    def _is_split(self, index: int, num_images: int) -> bool:
        below, last = self.config.split_below_images, self.config.split_last_images
        return (below is None or num_images < below) and (last is None or index >= num_images - last)

    def _smaller(self, image: PlannedImage) -> PlannedImage | None:
        layout = self.tiling.degrade(image.layout, *image.size)
        if layout is None:
            return None
        tokens = self.image_tokens(layout, image.size, image.index)
        return replace(image, layout=layout, tokens=tokens, is_degraded=True)

    def _cut(self, images: Sequence[PlannedImage]) -> Tensor:
        tiles = [torch.empty(0, 3, self.tile_size, self.tile_size, dtype=torch.uint8)]
        for image in images:
            tiles.append(self.tiling.cut(load_image(image.source, self.config.max_image_pixels), image.layout))
        return torch.cat(tiles)


def _reference(conversation: Conversation) -> str:
    """What the model should answer to the prompt of a conversation."""
    last = conversation.messages[-1]
    if not conversation.is_document:
        return last.text if last.role == "assistant" else ""
    images = [number for number, part in enumerate(last.parts) if isinstance(part, ImageRef)]
    behind = last.parts[images[-1] + 1 :] if images else last.parts
    return "".join(part for part in behind if isinstance(part, str))
