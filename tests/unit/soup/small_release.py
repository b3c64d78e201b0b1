"""Small models written as releases, from given numbers: no training, no ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_vlm import TINY, VOCAB_SIZE
from torch import Tensor

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.release import ReleaseTensor, write_release
from megavlm.config import dump_recipe, validate
from megavlm.convert.parts import ModelFile, ModelParts, weight_shapes
from megavlm.recipe import Recipe


def recipe_of(model: dict[str, Any], save: Path) -> Recipe:
    """A recipe of a run."""
    tree = {
        "model": model,
        "tokenizer": {"kind": "huggingface", "path": "nowhere"},
        "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 64},
        "engine": {"kind": "megatron"},
        "training": {
            "trainable": ["vision", "connector", "lora" if model["language"].get("lora") else "language"],
            "train_iters": 9,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "optimizer": {"lr": 0.1},
        },
        "checkpoint": {"save": str(save)},
    }
    return validate(tree, Recipe, "test")


def write_model(
    folder: Path,
    model: dict[str, Any] | None = None,
    *,
    value: Callable[[str, ReleaseTensor], Tensor] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocabulary: bytes = b"a b",
    trained: bool = True,
) -> Path:
    """Write ``release/`` of a model, with a recipe if it was ``trained``.

    Its numbers are ``value(key, tensor)``, or drawn. Returns the run folder.
    """
    recipe = recipe_of(model or TINY, folder)
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(ModelParts.of(recipe.model), VOCAB_SIZE)
    tensors = {key: ReleaseTensor(one.shape, one.padded_shape, dtype) for key, one in shapes.items()}

    def read(key: str) -> Tensor:
        if value is not None:
            return value(key, tensors[key]).to(dtype)
        return torch.randn(tensors[key].shape, generator=generator).to(dtype)

    files: dict[str, bytes | Path] = {"tokenizer/vocab.txt": vocabulary}
    if trained:
        files["recipe.yaml"] = dump_recipe(recipe).encode()
    else:
        files["model.yaml"] = ModelFile(model=ModelParts.of(recipe.model), tokenizer=recipe.tokenizer).dump().encode()
    write_release(RunFolder(folder), tensors, read, files)
    return folder
