"""A tiny NVLM-D, NVLM-X and NVLM-H, mixed batches for them, and one function that trains one under a layout."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megavlm.batch import ALL_AMONG_TOKENS, Batch, TileRoute
from megavlm.data import Sample, collate
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.expansion import ImageTokens, count_tokens, expand, route_tile
from megavlm.engines import MegatronEngine, MegatronEngineConfig, OptimizerSettings
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import Trainable
from megavlm.models.vlm import VLM
from megavlm.runtime.seed import set_seed
from megavlm.runtime.sharding import sharding_metadata
from megavlm.training.freeze import freeze_except

VOCAB_SIZE = 100
IMAGE_TOKEN_ID = 99
TILE_SIZE = 28

TINY: dict[str, Any] = {
    "vision": {
        "kind": "internvit",
        "image_size": TILE_SIZE,
        "patch_size": 7,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_qkv_bias": True,
        "layer_scale": 1.0,
        "init_method_std": 0.2,  # large weights, so that every gradient is far above rounding
    },
    "connector": {"kind": "mlp", "ffn_hidden_size": 64, "init_method_std": 0.2},
    "fusion": {"kind": "decoder_only"},
    "language": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "add_qkv_bias": True,
        "init_method_std": 0.1,
    },
}

CROSS_ATTENTION = {"kind": "cross_attention", "every_n_layers": 2}
HYBRID = {"kind": "hybrid", "every_n_layers": 2, "tag_integration": "concatenate"}
X: dict[str, Any] = {**TINY, "fusion": CROSS_ATTENTION, "connector": {"kind": "mlp", "num_layers": 1}}
H: dict[str, Any] = {**TINY, "fusion": HYBRID}
ADDING_H: dict[str, Any] = {**TINY, "fusion": {**HYBRID, "tag_integration": "add"}}
FLAMINGO: dict[str, Any] = {**X, "fusion": {**CROSS_ATTENTION, "feed_forward": {}, "text_sees": "last_image"}}
ALL_PARTS = ("vision", "connector", "cross_attention", "language")


Shard = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]
"""Checkpoint key, full shape, offset, values."""


@dataclass
class Outcome:
    """What some steps of training gave, on one rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    """Gradients of the last step."""


def make_batch(rows: Sequence[Sequence[int]], seed: int, length: int = 40) -> Batch:
    """Make a micro-batch.

    Args:
        rows: for each row the number of tiles of each of its images; empty for a text-only row.
        seed: of tokens and pixels.
        length: tokens of a row.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), length)
    tokens = torch.randint(0, IMAGE_TOKEN_ID, shape, generator=generator)
    for row, images in enumerate(rows):
        start = 1
        for num_tiles in images:
            tokens[row, start : start + 4 * num_tiles] = IMAGE_TOKEN_ID
            start += 4 * num_tiles + 2
    labels = torch.randint(0, IMAGE_TOKEN_ID, shape, generator=generator)
    loss_mask = (torch.rand(shape, generator=generator) > 0.6).float() * (tokens != IMAGE_TOKEN_ID)
    tiles_per_image = torch.tensor([tiles for images in rows for tiles in images], dtype=torch.int64)
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=torch.arange(length).repeat(len(rows), 1),
        cu_seqlens=torch.arange(0, len(rows) * length + 1, length, dtype=torch.int32),
        tiles=torch.randint(
            0, 256, (int(tiles_per_image.sum()), 3, TILE_SIZE, TILE_SIZE), generator=generator, dtype=torch.uint8
        ),
        tiles_per_image=tiles_per_image,
        visible_tiles=torch.zeros(*shape, 2, dtype=torch.int64),
    )


def make_sample(images: Sequence[int], generator: torch.Generator, length: int, route: TileRoute) -> Sample:
    """Make a sample whose tokens are laid out by the data package.

    Args:
        images: tiles of each image; the last of several is the thumbnail. Three tokens of text before each, two behind.
        generator: of tokens and pixels.
        length: least tokens.
        route: how the model takes the tiles.
    """

    def text(num_tokens: int) -> TokenRun:
        ids = torch.randint(0, IMAGE_TOKEN_ID, (num_tokens,), generator=generator).tolist()
        return TokenRun(tuple(ids), is_trained=True)

    runs: list[TokenRun | ImageSlot] = [text(2)]
    tokens = []
    for num_tiles in images:
        runs += [text(3), ImageSlot(), text(2)]
        tags = [text(2).ids for _ in range(num_tiles)]
        tokens.append(
            ImageTokens(
                tuple(
                    route_tile(tag, 4, route, is_whole_image=number == num_tiles - 1) for number, tag in enumerate(tags)
                )
            )
        )
    runs.append(text(max(2, length - count_tokens(runs, tokens))))
    expansion = expand(runs, tokens, IMAGE_TOKEN_ID, route.text_sees)
    shape = (sum(images), 3, TILE_SIZE, TILE_SIZE)
    kept = torch.rand(expansion.loss_mask.shape, generator=generator) > 0.4
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return replace(expansion, loss_mask=expansion.loss_mask * kept).with_tiles("made", tiles, images)


def make_routed_batch(
    rows: Sequence[Sequence[int]], seed: int, route: TileRoute, length: int = 24, pad_multiple: int = 2
) -> Batch:
    """Make a micro-batch as a loader does: for each row the tiles of each of its images."""
    generator = torch.Generator().manual_seed(seed)
    samples = [make_sample(images, generator, length, route) for images in rows]
    return collate(samples, pad_id=0, tile_size=TILE_SIZE, pad_multiple=pad_multiple, uses_context=route.uses_context)


def mixed_batches(step: int, route: TileRoute = ALL_AMONG_TOKENS) -> list[Batch]:
    """Four micro-batches of different lengths: text only, one image, several images, and one that trains nothing."""
    seed = 100 * step
    if route.uses_context:
        batches = [
            make_routed_batch([[3], []], seed, route, length=24),
            make_routed_batch([[], []], seed + 1, route, length=32),
            make_routed_batch([[1, 4], [2]], seed + 2, route, length=40),
            make_routed_batch([[1], [2, 1, 1]], seed + 3, route, length=28),
        ]
    else:
        batches = [
            make_batch([[3], []], seed, length=24),
            make_batch([[], []], seed + 1, length=32),
            make_batch([[1, 4], [2]], seed + 2, length=40),
            make_batch([[1], [2, 1, 1]], seed + 3, length=28),
        ]
    batches[3 if step % 2 else 0].loss_mask.zero_()
    return batches


def train_tiny(
    engine_config: dict[str, Any],
    trainable: Sequence[str] | Trainable = ALL_PARTS,
    num_steps: int = 3,
    model: dict[str, Any] | None = None,
    clip_grad: float = 1.0,
) -> Outcome:
    """Train on this rank's share of :func:`mixed_batches`; gradients are unclipped if ``clip_grad`` is 0."""
    engine, chunks = build_tiny(engine_config, trainable, model)
    # a large epsilon: otherwise the first steps turn the rounding of a gradient near zero into a full learning rate
    engine.build_optimizer(OptimizerSettings(lr=1e-2, clip_grad=clip_grad, adam_eps=1e-4))
    outcome = Outcome()
    for step in range(num_steps):
        batches = mixed_batches(step, chunks[0].route)
        result = engine.train_step(batches[engine.data_parallel_rank :: engine.data_parallel_size])
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
    outcome.shards = gradient_shards(chunks)
    return outcome


def build_tiny(
    engine_config: dict[str, Any],
    trainable: Sequence[str] | Trainable = ALL_PARTS,
    model: dict[str, Any] | None = None,
) -> tuple[MegatronEngine, list[torch.nn.Module]]:
    """Build, initialise, freeze and wrap the model under a layout."""
    config = VLMConfig.model_validate(model or TINY)
    engine = MegatronEngine(MegatronEngineConfig(**engine_config))
    engine.start()
    set_seed(3)
    chunks: list[torch.nn.Module] = [
        VLM(
            config,
            engine.config.megatron_settings(),
            vocab_size=VOCAB_SIZE,
            image_token_id=IMAGE_TOKEN_ID,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            vp_stage=stage.vp_stage,
        )
        for stage in engine.stages()
    ]
    initialize_weights(chunks, seed=7)
    open_gates(chunks)
    freeze_except(chunks, trainable)
    engine.wrap(chunks)
    return engine, chunks


def open_gates(chunks: Sequence[torch.nn.Module], value: float = 0.7) -> None:
    """Let cross-attention through: fresh gates are zero, behind which no weight has a gradient."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(".gate"):
                parameter.data.fill_(value)


def gradient_shards(chunks: Sequence[torch.nn.Module]) -> list[Shard]:
    """The gradients of this rank, each with its place in the full tensor. Needs unsharded gradient buffers."""
    found = []

    def visit(entry: Any) -> None:
        if isinstance(entry, dict):
            for value in entry.values():
                visit(value)
        elif isinstance(entry, ShardedTensorFactory):
            gradient = getattr(entry.data, "main_grad", None)
            if gradient is not None:
                pieces = entry.build_fn(entry.key, gradient, entry.replica_id, entry.flattened_range)
                for piece in pieces if isinstance(pieces, list) else [pieces]:
                    add(piece, piece.data)
        elif isinstance(entry, ShardedTensor):
            gradient = getattr(entry.data, "main_grad", None)
            if gradient is not None:
                add(entry, gradient)

    def add(shard: ShardedTensor, gradient: torch.Tensor) -> None:
        own_shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        values = gradient.detach().float().reshape(own_shape).numpy().copy()
        found.append((shard.key, tuple(shard.global_shape), tuple(shard.global_offset), values))

    for chunk in chunks:
        visit(chunk.sharded_state_dict(metadata=sharding_metadata()))
    return found


def assemble(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """Put the shards of all ranks together. Copies of one shard must agree."""
    full: dict[str, np.ndarray] = {}
    for outcome in outcomes:
        for key, shape, offset, values in outcome.shards:
            target = full.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            window = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
            known = ~np.isnan(target[window])
            np.testing.assert_allclose(target[window][known], values[known], rtol=1e-4, atol=1e-6, err_msg=key)
            target[window] = values
    assert not any(np.isnan(values).any() for values in full.values())
    return full
