"""Small dense runs to upcycle: trained for some steps on ranks, saved as a run saves."""

from pathlib import Path
from typing import Any

import torch
from tiny_vlm import ADDING_H, ALL_PARTS, TINY, X, build_tiny, mixed_batches

from megavlm.checkpoint import load_checkpoint, save_checkpoint
from megavlm.config import dump_recipe, validate
from megavlm.engines import OptimizerSettings
from megavlm.recipe import Recipe

SETTINGS = OptimizerSettings(lr=1e-3, adam_eps=1e-4)
STEPS = 3
MODELS: dict[str, dict[str, Any]] = {"D": TINY, "X": X, "H": ADDING_H}


def recipe_of(model: dict[str, Any], save: Path) -> Recipe:
    """A recipe of a run."""
    tree = {
        "model": model,
        "tokenizer": {"kind": "huggingface", "path": "nowhere"},
        "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 64},
        "engine": {"kind": "megatron"},
        "training": {
            "trainable": ["vision", "connector", "language"],
            "train_iters": 9,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "optimizer": {"lr": 0.1},
        },
        "checkpoint": {"save": str(save), "pretrained_checkpoint": "nowhere"},
    }
    return validate(tree, Recipe, "test")


def train_dense(
    folder: Path, model: dict[str, Any], engine: dict[str, Any], trainable: tuple[str, ...] = ALL_PARTS
) -> list[float]:
    """On ranks: train and save ``iter_0000003``. Returns the losses."""
    built, chunks = build_tiny(engine, trainable, model)
    built.build_optimizer(SETTINGS)
    losses = take_steps(built, chunks, 0, STEPS)
    files = {"recipe.yaml": dump_recipe(recipe_of(model, folder)), "tokenizer/vocab.txt": "a b"}
    save_checkpoint(folder, STEPS, built, extra={"consumed_samples": 24}, files=files)
    return losses


def take_steps(built: Any, chunks: Any, first: int, last: int) -> list[float]:
    """Train on the batches of some steps."""
    losses = []
    for step in range(first, last):
        batches = mixed_batches(step, chunks[0].route)
        result = built.train_step(batches[built.data_parallel_rank :: built.data_parallel_size])
        assert result.skip_reason is None
        losses.append(result.loss)
    return losses


def go_on(
    checkpoint: Path,
    model: dict[str, Any],
    engine: dict[str, Any],
    with_optimizer: bool,
    num_steps: int,
    trainable: tuple[str, ...] = ALL_PARTS,
) -> tuple[float, list[float], int, dict[str, Any]]:
    """On ranks: load, measure the loss of step 3's batches, train. Returns it, the losses, the step and the extra."""
    built, chunks = build_tiny(engine, trainable, model)
    built.build_optimizer(SETTINGS)
    loaded = load_checkpoint(checkpoint, built, with_optimizer=with_optimizer)
    batches = mixed_batches(STEPS, chunks[0].route)
    with torch.no_grad():
        evaluated = built.evaluate(batches[built.data_parallel_rank :: built.data_parallel_size])
    losses = take_steps(built, chunks, STEPS, STEPS + num_steps)
    return evaluated.mean(), losses, loaded.iteration, loaded.extra
