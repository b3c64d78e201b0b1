"""A small run with LoRA, in a module that ranks can import by its name."""

from pathlib import Path
from typing import Any

from tiny_vlm import build_tiny, mixed_batches

from megavlm.checkpoint import save_checkpoint
from megavlm.config import dump_recipe, validate
from megavlm.engines import OptimizerSettings
from megavlm.recipe import Recipe

STEPS = 3


def train_lora(folder: Path, model: dict[str, Any], engine: dict[str, Any]) -> None:
    """On ranks: train LoRA and connector, and save ``iter_0000003``."""
    tree = {
        "model": model,
        "tokenizer": {"kind": "huggingface", "path": "nowhere"},
        "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 64},
        "engine": {"kind": "megatron"},
        "training": {
            "trainable": ["lora", "connector"],
            "train_iters": STEPS,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "optimizer": {"lr": 0.01},
        },
        "checkpoint": {"save": str(folder)},
    }
    recipe = validate(tree, Recipe, "test")
    built, chunks = build_tiny(engine, recipe.training.trainable, model)
    built.build_optimizer(OptimizerSettings(lr=0.03, adam_eps=1e-4))
    for step in range(STEPS):
        built.train_step(mixed_batches(step, chunks[0].route))
    save_checkpoint(folder, STEPS, built, extra={"consumed_samples": 24}, files={"recipe.yaml": dump_recipe(recipe)})
