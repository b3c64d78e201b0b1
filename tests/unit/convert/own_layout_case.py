"""Tiny models as checkpoints of the engine, what they answer there, and the same inputs for ``transformers``."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from tiny_vlm import ADDING_H, ALL_PARTS, IMAGE_TOKEN_ID, TILE_SIZE, TINY, VOCAB_SIZE, H, X, build_tiny, make_sample
from tiny_vlm import mixed_batches as mixed
from torch import Tensor

from megavlm.batch import Batch
from megavlm.checkpoint import save_checkpoint
from megavlm.data import Sample
from megavlm.engines import MegatronEngineConfig
from megavlm.inference.generate import generate
from megavlm.models.config import VLMConfig

CLIP = {"kind": "clip", "image_size": 28, "patch_size": 7, "num_layers": 3, "select_layer": -2, "hidden_size": 32}
CLIP |= {"ffn_hidden_size": 48, "num_attention_heads": 4, "init_method_std": 0.2}
DINOV2 = {"kind": "dinov2", "image_size": 28, "pretrained_image_size": 28, "patch_size": 7, "num_layers": 2}
DINOV2 |= {"hidden_size": 32, "ffn_hidden_size": 128, "num_attention_heads": 4, "init_method_std": 0.2}
SIGLIP = {**CLIP, "kind": "siglip", "image_size": 28, "select_layer": -1}
LAST_IMAGE = {"kind": "cross_attention", "first_layer": 1, "every_n_layers": 2, "text_sees": "last_image"}
LLAMA = {**TINY["language"], "add_qkv_bias": False, "kv_channels": 12, "num_query_groups": 1}
MODELS: dict[str, dict[str, Any]] = {
    "X": X,
    "X_clip_last_image": {**X, "vision": CLIP, "fusion": LAST_IMAGE, "language": LLAMA},
    "H_concatenate": H,
    "H_add": ADDING_H,
    "H_tied": {**ADDING_H, "language": {**LLAMA, "share_embeddings_and_output_weights": True}},
    "H_dinov2": {**ADDING_H, "vision": DINOV2},
    "X_siglip": {**X, "vision": SIGLIP},
    "D_without_bias": TINY,
    "D_one_layer": {**TINY, "connector": {"kind": "mlp", "num_layers": 1, "layernorm": False, "bias": True}},
    "D_epsilon": {**TINY, "connector": {"kind": "mlp", "layernorm_epsilon": 1e-2, "ffn_hidden_size": 24}},
}
MEAN_STD = {
    "internvit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
PROMPTS: list[list[int]] = [[], [3], [1, 2], [4]]
NUM_NEW_TOKENS = 6


def save_and_answer(
    layout: dict[str, Any], model: dict[str, Any], folder: Path
) -> tuple[list[Tensor], list[list[int]]]:
    """On every rank: save a checkpoint; answer the batches (logits ``[N * S, V]``) and the prompts (greedy tokens)."""
    engine, chunks = build_tiny(layout, ALL_PARTS, model)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.ndim == 1 and parameter.numel() > 1:  # norms, biases, layer scales
                    parameter += 0.3 * torch.arange(parameter.numel()).sin()
    text = yaml.safe_dump({"model": VLMConfig.model_validate(model).model_dump(mode="json")})
    ids = json.dumps({"image_token_id": IMAGE_TOKEN_ID, "pad_token_id": 0})
    files = {"model.yaml": text, "published/config.json": ids}
    save_checkpoint(folder, 1, engine, files=files, with_optimizer=False)
    batches = batches_of(model)
    logits = [engine.logits(batch, torch.ones_like(batch.tokens), VOCAB_SIZE) for batch in batches]
    route = VLMConfig.model_validate(model).fusion.tile_route
    parts: Any = SimpleNamespace(
        engine=engine,
        recipe=SimpleNamespace(engine=MegatronEngineConfig(**layout)),
        tokenizer=SimpleNamespace(pad_id=0),
        processor=SimpleNamespace(tile_size=TILE_SIZE, route=route, stop_token_ids=frozenset(), stop_text=""),
        vocab_size=VOCAB_SIZE,
        pad_multiple=1,
    )
    return logits, generate(parts, prompts_of(model), max_new_tokens=NUM_NEW_TOKENS)


def batches_of(model: dict[str, Any]) -> list[Batch]:
    """One image, text rows, several images, several rows; a text-only batch."""
    return mixed(1, VLMConfig.model_validate(model).fusion.tile_route)


def prompts_of(model: dict[str, Any]) -> list[Sample]:
    """Prompts of different lengths: of text, with one image, with several."""
    generator = torch.Generator().manual_seed(11)
    route = VLMConfig.model_validate(model).fusion.tile_route
    return [make_sample(tiles, generator, length, route) for tiles, length in zip(PROMPTS, (5, 12, 20, 9), strict=True)]


def pixels_of(tiles: Tensor, kind: str) -> Tensor:
    """Tiles ``[T, 3, H, W]`` of bytes as pixel values."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD[kind])
    return (tiles.float() / 255 - mean) / std


def batch_inputs(batch: Batch, model: dict[str, Any]) -> dict[str, Tensor]:
    """A batch of ours as the arguments of the published class. It is padded on the right: no mask is needed."""
    inputs = {"input_ids": batch.tokens}
    if batch.tiles.shape[0]:
        inputs["pixel_values"] = pixels_of(batch.tiles, model["vision"]["kind"])
    if batch.context_length and batch.tiles.shape[0]:
        counts = torch.bincount(batch.tile_rows, minlength=len(batch.tokens))
        starts = counts.cumsum(0) - counts
        inputs["num_tiles"] = counts
        inputs["visible_tiles"] = batch.visible_tiles - starts[:, None, None]
        inputs["tile_in_context"] = batch.tile_context != 0
        inputs["tile_tags"] = batch.tile_tags
    return inputs


def prompt_inputs(prompts: Sequence[Sample], model: dict[str, Any]) -> dict[str, Tensor]:
    """Prompts as one batch, padded on the left."""
    length = max(prompt.num_tokens for prompt in prompts)
    uses_context = model["fusion"]["kind"] != "decoder_only"
    rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "visible_tiles": []}
    for prompt in prompts:
        pads = length - prompt.num_tokens
        rows["input_ids"].append(torch.nn.functional.pad(prompt.tokens, (pads, 0)))
        rows["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(prompt.tokens), (pads, 0)))
        rows["visible_tiles"].append(torch.nn.functional.pad(prompt.visible_tiles, (0, 0, pads, 0)))
    inputs = {name: torch.stack(values) for name, values in rows.items()}
    tiles = torch.cat([prompt.tiles for prompt in prompts])
    if tiles.shape[0]:
        inputs["pixel_values"] = pixels_of(tiles, model["vision"]["kind"])
    if not uses_context:
        del inputs["visible_tiles"]
        return inputs
    longest = max(prompt.tile_tags.shape[1] for prompt in prompts)
    tags = [
        torch.nn.functional.pad(prompt.tile_tags, (0, longest - prompt.tile_tags.shape[1]), value=-1)
        for prompt in prompts
    ]
    return inputs | {
        "num_tiles": torch.tensor([prompt.tiles.shape[0] for prompt in prompts]),
        "tile_in_context": torch.cat([prompt.tile_context for prompt in prompts]) != 0,
        "tile_tags": torch.cat(tags),
    }
