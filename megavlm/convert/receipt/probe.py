"""The inputs that both sides of a conversion are given: sentences, and pictures that come with matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor

from megavlm.convert.receipt.pair import Pair
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.expansion import Expansion, expand, route_image
from megavlm.data.image import load_image
from megavlm.data.tilings.layout import TileLayout, cut_tiles
from megavlm.data.tokenizers import HuggingFaceTokenizerConfig, SentencePieceTokenizerConfig, Tokenizer
from megavlm.models.config import VLMConfig
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vision.dual import DualConfig

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "In 1969 two people walked on the Moon, and 600 million watched them.",
    "def area(width, height): return width * height  # of a rectangle",
)
PICTURES = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png")
_BEFORE, _AFTER = "A picture:", " What does it show? It shows"
_RANDOM_LENGTHS = (16, 24, 32)
_RANDOM_AROUND = (4, 8)
_SEED = 20240914


@dataclass(frozen=True)
class Probe:
    """One input. Shape letters: S tokens, T tiles, H W pixels."""

    name: str
    tokens: Tensor
    """``[S]`` int64, placeholders included; empty for a vision encoder alone."""
    tiles: Tensor
    """``[T, 3, H, W]`` uint8."""
    pixel_values: Tensor
    """``[T, 3, H, W]`` float32: the tiles as our vision encoder normalises them."""
    expansion: Expansion | None = None
    """Where the tiles go, of a whole model with cross-attention."""


@dataclass(frozen=True)
class Probes:
    """All inputs, and what was left out."""

    probes: list[Probe]
    image_token_id: int
    """-1 where there is none: no picture is among the inputs."""
    vocab_size: int
    """Tokens that both sides know; 0 for a vision encoder alone."""
    not_compared: list[str]


def make_probes(pair: Pair, vocab_size: int, image_token_id: int) -> Probes:
    """Make the inputs for a pair of folders.

    Args:
        pair: the folders.
        vocab_size: tokens that both sides know; 0 without a language model.
        image_token_id: the published model's placeholder; -1 if it has none.

    Raises:
        ValueError: the folder's tokenizer is damaged.
    """
    parts, left_out = pair.parts, []
    pictures = []
    layout = TileLayout(1, 1, has_thumbnail=False)
    if parts.is_whole and parts.whole().fusion.tile_route.uses_context:
        layout = TileLayout(2, 1, has_thumbnail=True)
    if parts.vision is not None:
        pictures = [(f"picture {n}", *_tiles(file, parts.vision, layout)) for n, file in enumerate(PICTURES, start=1)]
    if parts.language is None:
        return Probes([Probe(n, _no_tokens(), tile, pixels) for n, tile, pixels in pictures], -1, 0, [])
    if pictures and not 0 <= image_token_id < vocab_size:
        left_out.append(f"pictures not compared: image_token_id={image_token_id} is none of the {vocab_size} tokens")
        pictures, image_token_id = [], -1
    texts, around = _texts(pair.published.path, vocab_size, image_token_id)
    nothing = torch.zeros(0, 3, 1, 1)
    probes = [Probe(name, tokens, nothing.byte(), nothing) for name, tokens in texts]
    for name, tile, pixels in pictures:
        expansion = _expand(parts.whole(), layout, around, image_token_id)
        probes.append(Probe(name, expansion.tokens, tile, pixels, expansion))
    return Probes(probes, image_token_id, vocab_size, left_out)


def _texts(folder: Path, vocab_size: int, image_token_id: int) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """Rows of text by name, and what stands before and after a picture."""
    tokenizer = _find_tokenizer(folder)
    if tokenizer is not None:
        rows = [tokenizer.encode(text, starts_text=True) for text in SENTENCES]
        around = [tokenizer.encode(_BEFORE, starts_text=True), tokenizer.encode(_AFTER)]
        if all(0 <= token < vocab_size and token != image_token_id for row in rows + around for token in row):
            names = [f"sentence {number}" for number in range(1, len(rows) + 1)]
            return list(zip(names, map(torch.tensor, rows), strict=True)), [torch.tensor(row) for row in around]
    generator = torch.Generator().manual_seed(_SEED)

    def draw(length: int) -> Tensor:
        tokens = torch.randint(vocab_size, (length,), generator=generator)
        return torch.where(tokens == image_token_id, (tokens + 1) % vocab_size, tokens)

    names = [f"random tokens {number}" for number in range(1, len(_RANDOM_LENGTHS) + 1)]
    return [(n, draw(k)) for n, k in zip(names, _RANDOM_LENGTHS, strict=True)], [draw(k) for k in _RANDOM_AROUND]


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return HuggingFaceTokenizerConfig(path=folder).build()
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizerConfig(path=folder).build()
    return None


def _expand(model: VLMConfig, layout: TileLayout, around: Sequence[Tensor], image_token_id: int) -> Expansion:
    """A picture between two texts. Tags, where cross-attention reads some, are the first tokens of the second."""
    before, after = (tuple(text.tolist()) for text in around)
    tags: list[tuple[int, ...]] = [()] * layout.num_tiles
    if model.fusion.tile_route.uses_context:
        tags = [after[:length] for length in range(layout.num_tiles)]
    image = route_image(tags, layout, model.tokens_per_tile, model.fusion.tile_route)
    runs = (TokenRun(before, is_trained=False), ImageSlot(), TokenRun(after, is_trained=False))
    return expand(runs, [image], image_token_id, model.fusion.tile_route.text_sees)


def _tiles(name: str, vision: AnyVisionConfig, layout: TileLayout) -> tuple[Tensor, Tensor]:
    """A picture as tiles ``[T, 3, H, W]`` of bytes, and as pixel values."""
    assert not isinstance(vision, DualConfig), "no published folder holds one"
    image = load_image(str(get_sample_data(name, asfileobj=False)))
    tile = cut_tiles(image, layout, vision.image_size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.image_mean, vision.image_std))
    return tile, (tile.float() / 255 - mean) / std


def _no_tokens() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)
