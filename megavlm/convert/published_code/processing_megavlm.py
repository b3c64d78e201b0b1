"""Prompts and images as a model trained with MegaVLM expects them: the same tokens, the same tiles.

This file travels inside exported folders: it needs the two files beside it, torch and transformers, and nothing else.
Use: ``AutoProcessor.from_pretrained(folder, trust_remote_code=True)``. Shape letters: N rows, S tokens a row, I images,
T tiles of all images, G tokens of a tag.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .text_megavlm import PromptText
from .tiles_megavlm import Grid, Tiler, open_image


class MegaVLMProcessor(ProcessorMixin):
    """Makes model inputs of text and images."""

    def __init__(self, tokenizer: Any = None, settings: Mapping[str, Any] | None = None, chat_template: Any = None):
        """Keep the parts.

        Args:
            tokenizer: of the folder.
            settings: of ``processor_config.json``.
            chat_template: Jinja.

        Raises:
            ValueError: there are no settings, or the tokenizer is not the one that they are for.
        """
        super().__init__(tokenizer, chat_template=chat_template)
        if settings is None:
            raise ValueError("settings=None: processor_config.json holds none. Export the model again.")
        self.settings = dict(settings)
        self.image_token = str(settings["image_token"])
        self.image_token_id = int(settings["reserved"][self.image_token])
        for spelling, index in settings["reserved"].items():
            found = tokenizer.convert_tokens_to_ids(spelling)
            if found != index:
                raise ValueError(
                    f"tokenizer: {spelling!r} is {found}, and the model was trained with {index}. Take the tokenizer "
                    "files that came with processor_config.json."
                )
        self._text = PromptText(tokenizer, settings)
        self._tiler = Tiler(settings)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def apply_chat_template(self, conversation: Any, *arguments: Any, **options: Any) -> Any:
        """See :meth:`transformers.ProcessorMixin.apply_chat_template`.

        With ``tokenize=True`` special tokens that somebody spells inside a message are read as ordinary text.
        """
        if options.get("tokenize"):
            conversation = self._text.shielded(conversation)
        return super().apply_chat_template(conversation, *arguments, **options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = False,
        videos: None = None,
        audio: None = None,
    ) -> BatchFeature:
        """Make inputs of prompts and of the images that they name.

        Args:
            images: paths, addresses or PIL images, in the order of the image tokens of the texts; lists may be nested.
            text: one prompt or several, special tokens spelt out, one image token for each image.
            padding: several rows are filled on the left; ``False`` does so only for a tensor of several rows.
            return_tensors: ``pt``, or None for lists of token ids.
            add_special_tokens: must be False: the chat template writes them.
            videos, audio: must be None: the model knows neither.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[N, S]``; with images ``pixel_values [T, 3, H, W]`` float32. For a
            model with cross-attention also ``num_tiles [N]``, ``visible_tiles [N, S, 2]`` (half-open ranges of its
            row's tiles that each token may see), ``tile_in_context [T]`` and ``tile_tags [T, G]`` (ids of the tag that
            goes into the context with a tile, -1 behind its end).

        Raises:
            ValueError: the number of images is not that of image tokens, or a prompt is too long.
        """
        if text is None or add_special_tokens:
            raise ValueError(
                f"text={text!r}, add_special_tokens={add_special_tokens}: a text is needed, which spells its special "
                "tokens. Use apply_chat_template."
            )
        if videos is not None or audio is not None:
            raise ValueError("videos, audio: the model was trained on images and text alone. Give none.")
        supply = iter(_flat(images))
        rows = [self._row(prompt, supply) for prompt in ([text] if isinstance(text, str) else text)]
        left_over = len(list(supply))
        if left_over:
            raise ValueError(
                f"images: {left_over} more than the texts have {self.image_token}. Write one for each image."
            )
        return self._batch(rows, return_tensors, must_pad=bool(padding) and padding != "do_not_pad")

    def _row(self, prompt: str, supply: Iterator[Any]) -> "_Row":
        """One prompt with its images."""
        runs = self._text.runs(prompt)
        images = []
        for _ in range(runs.count(None)):
            source = next(supply, None)
            if source is None:
                raise ValueError(
                    f"images: the texts have more {self.image_token} than there are images. Give one for each."
                )
            picture = open_image(source)
            images.append(_Image(picture, self._tiler.grid(picture.size)))
            self._expand(images[-1])
        self._fit(sum(len(run) for run in runs if run is not None), images)
        row = _Row()
        pictures = iter(images)
        sees_last_only = self.settings["text_sees"] == "last_image"
        seen = (0, 0)
        for run in runs:
            if run is not None:
                row.add(run, seen)
                continue
            image = next(pictures)
            first = len(row.in_context)
            everything = (first, first + len(image.tiles))
            uses_context = any(tile.is_in_context for tile in image.tiles)
            for tile in image.tiles:
                this = (len(row.in_context), len(row.in_context) + 1)
                row.add(tile.tag_ids, this)
                row.add([self.image_token_id] * tile.num_image_tokens, everything if uses_context else this)
                row.in_context.append(tile.is_in_context)
                row.tile_tags.append(tile.context_tag_ids)
            seen = everything if sees_last_only else (0, len(row.in_context))
            row.tiles.append(self._tiler.cut(image.picture, image.grid))
        return row

    def _expand(self, image: "_Image") -> None:
        """Say which tokens each tile of an image gets: in the text, and in the context of cross-attention."""
        per_tile, where = self.settings["tokens_per_tile"], self.settings["context_tiles"]
        image.tiles = []
        for number, tag in enumerate(self._tiler.tags(image.grid, image.picture.size)):
            tag_ids = self._text.encode(tag) if tag else []
            if where == "none" or (where == "regular" and image.grid.is_whole_image(number)):
                image.tiles.append(_Tile(tag_ids, per_tile))
            elif self.settings["context_tags"] == "text":
                image.tiles.append(_Tile(tag_ids, 0, True))
            else:
                image.tiles.append(_Tile([], 0, True, tag_ids))

    def _fit(self, num_text_tokens: int, images: list["_Image"]) -> None:
        """Take tiles from the image that has most until the prompt fits what the model was trained on."""
        limit = self.settings["seq_length"]
        while (length := num_text_tokens + sum(image.num_tokens for image in images)) > limit:
            for image in sorted(images, key=lambda image: image.grid.num_tiles, reverse=True):
                if self._shrink(image):
                    break
            else:
                raise ValueError(
                    f"text: has {length} tokens with every image at its fewest tiles, and the model was trained on at "
                    f"most {limit}. Shorten it."
                )

    def _shrink(self, image: "_Image") -> bool:
        """Give an image fewer tiles, until its text is shorter; False if nothing makes it so."""
        grid, before, tiles = image.grid, image.num_tokens, image.tiles
        while (smaller := self._tiler.fewer(image.grid, image.picture.size)) is not None:
            image.grid = smaller
            self._expand(image)
            if image.num_tokens < before:
                return True
        image.grid, image.tiles = grid, tiles
        return False

    def _batch(self, rows: list["_Row"], return_tensors: str | None, *, must_pad: bool) -> BatchFeature:
        is_ragged = return_tensors is None and not must_pad
        longest = 0 if is_ragged else max(len(row.ids) for row in rows)
        pad = int(self.settings["pad_id"])
        num_pads = [max(longest - len(row.ids), 0) for row in rows]
        data: dict[str, Any] = {
            "input_ids": [[pad] * pads + row.ids for row, pads in zip(rows, num_pads, strict=True)],
            "attention_mask": [[0] * pads + [1] * len(row.ids) for row, pads in zip(rows, num_pads, strict=True)],
        }
        if return_tensors is not None:
            data = {name: torch.tensor(values, dtype=torch.int64) for name, values in data.items()}
        tiles = [image for row in rows for image in row.tiles]
        if tiles:
            data["pixel_values"] = self._normalised(torch.cat(tiles))
        if self.settings["context_tiles"] != "none":
            data |= _context(rows, num_pads)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _normalised(self, tiles: Tensor) -> Tensor:
        mean, std = (torch.tensor(self.settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        return (tiles.float() / 255 - mean) / std


@dataclass
class _Tile:
    """The tokens of one tile."""

    tag_ids: list[int]
    num_image_tokens: int
    is_in_context: bool = False
    context_tag_ids: list[int] = field(default_factory=list)


@dataclass
class _Image:
    """An image, its grid, and the tokens of its tiles."""

    picture: Any
    grid: Grid
    tiles: list[_Tile] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(tile.tag_ids) + tile.num_image_tokens for tile in self.tiles)


@dataclass
class _Row:
    """One prompt, expanded."""

    ids: list[int] = field(default_factory=list)
    visible: list[tuple[int, int]] = field(default_factory=list)
    """Range of the row's tiles that each token may see by cross-attention."""
    in_context: list[bool] = field(default_factory=list)
    """Whether cross-attention reads each tile."""
    tile_tags: list[list[int]] = field(default_factory=list)
    tiles: list[Tensor] = field(default_factory=list)
    """Of each image."""

    def add(self, ids: Sequence[int], visible: tuple[int, int]) -> None:
        """Append tokens that see the same."""
        self.ids += ids
        self.visible += [visible] * len(ids)


def _context(rows: list[_Row], num_pads: list[int]) -> dict[str, Tensor]:
    """What cross-attention needs to know."""
    visible = [[(0, 0)] * pads + row.visible for row, pads in zip(rows, num_pads, strict=True)]
    tags = [tag for row in rows for tag in row.tile_tags]
    longest = max(map(len, tags), default=0)
    padded = [[*tag, *[-1] * (longest - len(tag))] for tag in tags]
    return {
        "num_tiles": torch.tensor([len(row.in_context) for row in rows], dtype=torch.int64),
        "visible_tiles": torch.tensor(visible, dtype=torch.int64),
        "tile_in_context": torch.tensor([is_in for row in rows for is_in in row.in_context], dtype=torch.bool),
        "tile_tags": torch.tensor(padded, dtype=torch.int64).reshape(len(tags), longest),
    }


def _flat(images: Any) -> list[Any]:
    """Images of any nesting as one list."""
    if images is None:
        return []
    return [image for entry in images for image in _flat(entry)] if isinstance(images, list | tuple) else [images]
