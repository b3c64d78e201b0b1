"""Measures how far the upcycled model is from the dense one: logits of both on the same inputs, in float32.

Both models are in memory whole, one after the other. Shape letters: S tokens, V tokens of the vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.batch import ALL_AMONG_TOKENS, Batch, TileRoute
from megavlm.convert.parts import ModelParts
from megavlm.data import Sample, collate
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.expansion import ImageTokens, expand, route_tile
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.language import LanguageAlone
from megavlm.models.vlm import VLM
from megavlm.models.weights import fill_weights
from megavlm.runtime.process import process

_TEXT_LENGTHS = (32, 24)
_BEFORE_IMAGE, _AFTER_IMAGE = 4, 12
_NUM_TILES = 2  # the second is the thumbnail
_SEED = 20241009


@dataclass(frozen=True)
class ProbeRow:
    """How far both models are apart on one input."""

    name: str
    num_positions: int
    max_logit: float
    """Largest logit of the dense model, without its sign."""
    max_abs: float
    """Largest difference."""

    @property
    def max_rel(self) -> float:
        """Largest difference, relative to the largest logit."""
        return self.max_abs / max(self.max_logit, torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Side:
    """A model, and where its weights come from."""

    parts: ModelParts
    read: Callable[[str], Tensor]
    """Gives the full tensor of a checkpoint key."""


def compare(dense: Side, upcycled: Side, vocab_size: int) -> list[ProbeRow]:
    """Run the same inputs through both models. In a process without a process group.

    Args:
        dense, upcycled: the models; a whole one or a language model alone.
        vocab_size: V.

    Returns:
        A row for each input: two of text, and one with a picture if the model can see.
    """
    probes = _make_probes(dense.parts, vocab_size)
    expected, found = (_logits(side, list(probes.values()), vocab_size) for side in (dense, upcycled))
    return [
        ProbeRow(name, len(theirs), float(theirs.abs().max()), float((ours - theirs).abs().max().nan_to_num(torch.inf)))
        for name, theirs, ours in zip(probes, expected, found, strict=True)
    ]


def _logits(side: Side, batches: Sequence[Batch], vocab_size: int) -> list[Tensor]:
    """``[S, V]`` float32 of each batch."""
    with process():
        engine = MegatronEngine(MegatronEngineConfig())
        engine.start()
        settings = engine.config.megatron_settings()
        if side.parts.is_whole:
            model: MegatronModule = VLM(
                side.parts.whole(), settings, vocab_size=vocab_size, image_token_id=vocab_size - 1
            )
        else:
            assert side.parts.language is not None
            model = LanguageAlone(side.parts.language, settings, vocab_size)
        read = functools.lru_cache(maxsize=1)(side.read)  # experts that are not grouped ask one after the other
        fill_weights([model], lambda slot: read(slot.key))
        read.cache_clear()
        model = model.to(engine.device).eval()
        with torch.no_grad():
            return [
                model(batch.to(engine.device), torch.ones_like(batch.tokens).to(engine.device)).float().cpu()
                for batch in batches
            ]


def _make_probes(parts: ModelParts, vocab_size: int) -> dict[str, Batch]:
    """Random tokens, and random pixels; the last token of the vocabulary is the placeholder."""
    generator = torch.Generator().manual_seed(_SEED)
    route, tile_size, tokens_per_tile = ALL_AMONG_TOKENS, 1, 0
    if parts.is_whole:
        model = parts.whole()
        route, tile_size, tokens_per_tile = model.fusion.tile_route, model.vision.image_size, model.tokens_per_tile

    def text(length: int) -> TokenRun:
        ids = torch.randint(max(1, vocab_size - 1), (length,), generator=generator)
        return TokenRun(tuple(ids.tolist()), is_trained=True)

    def batch(runs: Sequence[TokenRun | ImageSlot], images: Sequence[ImageTokens]) -> Batch:
        sample = _sample(runs, images, vocab_size - 1, route, tile_size, generator)
        return collate([sample], pad_id=0, tile_size=tile_size, uses_context=route.uses_context)

    probes = {f"text of {length} tokens": batch([text(length)], []) for length in _TEXT_LENGTHS}
    if parts.is_whole:
        tiles = tuple(
            route_tile(text(1).ids, tokens_per_tile, route, is_whole_image=tile == _NUM_TILES - 1)
            for tile in range(_NUM_TILES)
        )
        runs: list[TokenRun | ImageSlot] = [text(_BEFORE_IMAGE), ImageSlot(), text(_AFTER_IMAGE)]
        probes[f"image of {_NUM_TILES} tiles"] = batch(runs, [ImageTokens(tiles)])
    return probes


def _sample(
    runs: Sequence[TokenRun | ImageSlot],
    images: Sequence[ImageTokens],
    image_token_id: int,
    route: TileRoute,
    tile_size: int,
    generator: torch.Generator,
) -> Sample:
    expansion = expand(runs, images, image_token_id, route.text_sees)
    tiles_per_image = [len(image.tiles) for image in images]
    shape = (sum(tiles_per_image), 3, tile_size, tile_size)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return expansion.with_tiles("probe", tiles, tiles_per_image)
