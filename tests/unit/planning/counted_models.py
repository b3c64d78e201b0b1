"""Models and micro-batches whose operations are counted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from small_connectors import SMALL_CONNECTORS, small_model
from tiny_vlm import IMAGE_TOKEN_ID, TINY

from megavlm.batch import Batch, TileRoute
from megavlm.models.config import VLMConfig

CLIP: dict[str, Any] = {
    "kind": "clip",
    "image_size": 28,
    "patch_size": 14,
    "num_layers": 3,
    "select_layer": -2,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 3,
}
DINOV2 = {**CLIP, "kind": "dinov2", "gated_linear_unit": True, "pretrained_image_size": 42}
PLAIN_CONNECTOR = {"kind": "mlp", "pixel_shuffle_ratio": 1.0, "bias": True, "layernorm": False}
MODELS: dict[str, dict[str, Any]] = {  # beside TINY: InternViT, a connector of two layers, grouped heads
    "internvit, one layer": {**TINY, "connector": {"kind": "mlp", "num_layers": 1}},
    "dinov2 with SwiGLU": {**TINY, "vision": DINOV2, "connector": PLAIN_CONNECTOR},
    "clip, two layers without a norm": {**TINY, "vision": CLIP, "connector": PLAIN_CONNECTOR},
    "clip, one layer without a norm": {**TINY, "vision": CLIP, "connector": {**PLAIN_CONNECTOR, "num_layers": 1}},
    "tied embeddings, wide heads, padded vocabulary": {
        **TINY,
        "language": {
            **TINY["language"],
            "num_query_groups": None,
            "kv_channels": 12,
            "vocab_size": 150,
            "make_vocab_size_divisible_by": 64,
            "share_embeddings_and_output_weights": True,
        },
    },
}
MODELS |= {f"connector {kind}": small_model(kind, TINY) for kind in SMALL_CONNECTORS}
EXPERTS: dict[str, dict[str, Any]] = {
    "every layer": {"num_moe_experts": 4},
    "every second layer, top 3, narrow experts": {
        "num_moe_experts": 8,
        "moe_layer_freq": 2,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 24,
    },
    "last layer, top 1": {
        "num_moe_experts": 2,
        "moe_layer_freq": [0, 0, 0, 1],
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_z_loss_coeff": 1e-3,
    },
    "experts filled up to their capacity": {
        "num_moe_experts": 4,
        "moe_expert_capacity_factor": 0.7,
        "moe_pad_expert_input_to_capacity": True,
    },
    "more room than tokens": {"num_moe_experts": 4, "moe_expert_capacity_factor": 4.0},
}
FUSIONS: dict[str, dict[str, Any]] = {
    "cross_attention": {"every_n_layers": 2, "first_layer": 1},
    "hybrid": {"every_n_layers": 3, "tag_integration": "concatenate"},
}
FEED_FORWARDS: dict[str, dict[str, Any]] = {
    "squared ReLU": {"ffn_hidden_size": 20},
    "SwiGLU": {"activation": "swiglu"},
}
LORAS: dict[str, dict[str, Any]] = {
    "queries and values": {"r": 3},
    "everything": {
        "r": 2,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "last layer": {"r": 5, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [3]},
}
_LANGUAGE = {**TINY["language"], "num_layers": 2}
_SMALL = {
    **TINY,
    "vision": {**TINY["vision"], "num_layers": 1},
    "language": {**_LANGUAGE, "num_layers": 1},
}
_INTERNVIT_300M = {"normalization": "LayerNorm", "qk_layernorm": False, "add_qkv_bias": False}
_PLAIN = {**_SMALL, "connector": {**PLAIN_CONNECTOR, "num_layers": 1}}
KINDS: dict[str, dict[str, Any]] = {
    **{f"connector {kind}": small_model(kind, _SMALL) for kind in SMALL_CONNECTORS},
    "vision internvit": {**_SMALL, "vision": TINY["vision"]},
    "vision internvit_300m": {**_SMALL, "vision": {**TINY["vision"], **_INTERNVIT_300M}},
    "vision clip": {**_PLAIN, "vision": CLIP},
    "vision dinov2": {**_PLAIN, "vision": {**DINOV2, "add_qkv_bias": False}},
    "vision eva": {**_PLAIN, "vision": {**CLIP, "kind": "eva"}},
    "vision siglip": {**_PLAIN, "vision": {**CLIP, "kind": "siglip", "select_layer": -1}},
    "vision dual": small_model("shared_mlp", {**_SMALL, "vision": TINY["vision"]}),
    "D": {**_SMALL, "language": _LANGUAGE},
    "tied": {**_SMALL, "language": {**_LANGUAGE, "add_qkv_bias": False, "share_embeddings_and_output_weights": True}},
    "X": {**_SMALL, "language": _LANGUAGE, "fusion": {"kind": "cross_attention", "every_n_layers": 1}},
    "H": {**_SMALL, "language": _LANGUAGE, "fusion": {"kind": "hybrid", "every_n_layers": 2}},
    "Flamingo": {
        **_SMALL,
        "language": _LANGUAGE,
        "fusion": {"kind": "cross_attention", "every_n_layers": 2, "feed_forward": {"ffn_hidden_size": 20}},
    },
    "experts": {**_SMALL, "language": {**_LANGUAGE, "moe": {"num_moe_experts": 2, "moe_layer_freq": [0, 1]}}},
    "LoRA": {**_SMALL, "language": {**_LANGUAGE, "lora": LORAS["everything"]}},
    "pairs": {
        **small_model("qformer", {**_SMALL, "vision": {**CLIP, "kind": "eva", "num_layers": 2}}),
        "language": {"kind": "qformer_text", "contrast_size": 6, "max_position_embeddings": 40},
    },
}
"""Small models of every kind. Where a name begins with ``connector`` or ``vision``, that part is looked at."""
KINDS["connector resampler"]["connector"] |= {"num_layers": 1, "qk_layernorm": True}
KINDS["connector c_abstractor"]["connector"] |= {"depth": 1, "mlp_depth": 3}
KINDS["connector linear"]["connector"] |= {"bias": True}
TILE_TOKENS, TAG_TOKENS = 4, 2


def make_batch(rows: Sequence[Sequence[int]], route: TileRoute, *, length: int = 40, tile_size: int = 28) -> Batch:
    """Make a micro-batch that trains two tokens of three; ``rows``: tiles of each image of each row."""
    tiles_per_image = [tiles for images in rows for tiles in images]
    num_tiles = sum(tiles_per_image)
    last = torch.tensor([tile == tiles - 1 for tiles in tiles_per_image for tile in range(tiles)], dtype=torch.bool)
    in_context = {"none": torch.zeros_like(last), "regular": ~last, "all": torch.ones_like(last)}[route.context_tiles]
    tile_rows = torch.tensor([row for row, images in enumerate(rows) for _ in range(sum(images))], dtype=torch.int64)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    visible_tiles = torch.zeros(len(rows), length, 2, dtype=torch.int64)
    for row in range(len(rows)):
        tokens[row, : TILE_TOKENS * int((~in_context[tile_rows == row]).sum())] = IMAGE_TOKEN_ID
        first = int((tile_rows < row).sum())
        visible_tiles[row] = torch.tensor([first, first + int((tile_rows == row).sum())])
    room = TILE_TOKENS + (TAG_TOKENS if route.context_tags == "concatenate" else 0)
    return Batch(
        tokens=tokens,
        labels=torch.ones_like(tokens),
        loss_mask=(torch.arange(tokens.numel()) % 3 > 0).float().view_as(tokens),
        position_ids=torch.arange(length).repeat(len(rows), 1),
        cu_seqlens=torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32),
        tiles=torch.zeros(num_tiles, 3, tile_size, tile_size, dtype=torch.uint8),
        tiles_per_image=torch.tensor(tiles_per_image, dtype=torch.int64),
        visible_tiles=visible_tiles,
        tile_rows=tile_rows,
        tile_context=in_context * room,
        tile_tags=torch.full((num_tiles, TAG_TOKENS), 5),
        context_length=7 * room if route.uses_context else 0,
    )


def packed_batch(route: TileRoute) -> Batch:
    """Rows of two samples each."""
    batch = make_batch([[1, 1], []], route)
    boundaries = torch.tensor([0, 17, 40, 60, 80], dtype=torch.int32)
    return dataclasses.replace(batch, cu_seqlens=boundaries, position_ids=batch.position_ids % 17)


def untrained_batch(route: TileRoute) -> Batch:
    """One image, no trained token."""
    batch = make_batch([[2]], route, length=16)
    return dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))


BATCHES: dict[str, Callable[[TileRoute], Batch]] = {
    "text": lambda route: make_batch([[], []], route, length=24),
    "images": lambda route: make_batch([[1, 4], [2], []], route),
    "one tile": lambda route: make_batch([[], [1]], route),
    "packed": packed_batch,
    "untrained": untrained_batch,
}


def batch_for(config: VLMConfig, kind: str) -> Batch:
    """Make the batch of a kind for a model: three pairs for one that learns from pairs."""
    if not config.learns_from_pairs:
        return BATCHES[kind](config.fusion.tile_route)
    batch = make_batch([[1], [1], [1]], TileRoute(), length=12)
    batch.loss_mask[:, : TILE_TOKENS - 1] = 0
    batch.loss_mask[:, -1] = 0
    return batch
