"""A small data set, a small recipe, and the ``megavlm`` command as a person runs it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import yaml
from command_line import run_warm
from PIL import Image

NUM_ROWS = 24


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a JSONL file of mixed rows and a tokenizer."""
    folder = tmp_path_factory.mktemp("dataset")
    random = np.random.default_rng(0)
    rows = []
    for number in range(NUM_ROWS):
        turns = [{"from": "human", "value": f"what is number {number}"}, {"from": "gpt", "value": f"it is {number}"}]
        row: dict[str, object] = {"id": str(number), "conversations": turns}
        num_images = number % 3
        if num_images:
            names = []
            for index in range(num_images):
                width, height = 28 * int(random.integers(1, 4)), 28 * int(random.integers(1, 3))
                name = f"{number}_{index}.png"
                Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
                names.append(name)
            turns[0]["value"] = "<image>\n" * num_images + turns[0]["value"]
            row["image"] = names if num_images > 1 else names[0]
        rows.append(row)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]), encoding="utf-8")
    text = folder / "text.txt"
    text.write_text("\n".join(turn["value"] for row in rows for turn in row["conversations"]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        byte_fallback=True,
        control_symbols=["<|im_start|>", "<|im_end|>", "<image>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


@pytest.fixture
def recipe(dataset: Path, tmp_path: Path) -> Path:
    """A recipe of 12 steps over the data set; its run folder is ``tmp_path/run``."""
    content = {
        "model": {
            "vision": {
                "kind": "internvit",
                "image_size": 28,
                "patch_size": 7,
                "num_layers": 1,
                "hidden_size": 16,
                "ffn_hidden_size": 32,
                "num_attention_heads": 2,
                "normalization": "LayerNorm",
                "qk_layernorm": False,
                "add_qkv_bias": True,
            },
            "connector": {"kind": "mlp", "ffn_hidden_size": 32},
            "fusion": {"kind": "decoder_only"},
            "language": {
                "num_layers": 2,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "attention_dropout": 0.1,  # so that a resumed run needs the random number generators too
                "hidden_dropout": 0.1,
            },
        },
        "tokenizer": {"kind": "sentencepiece", "path": str(dataset / "tokenizer.model")},
        "data": {
            "train": {"kind": "jsonl", "path": str(dataset / "train.jsonl")},
            "valid": {"kind": "jsonl", "path": str(dataset / "valid.jsonl")},
            "seq_length": 256,
            "num_workers": 0,
        },
        "engine": {"kind": "megatron"},
        "training": {
            "trainable": ["vision", "connector", "language"],
            "train_iters": 12,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"lr": 0.003, "min_lr": 0.0003, "lr_warmup_iters": 3},
        },
        "checkpoint": {"save": str(tmp_path / "run"), "save_interval": 4},
        "logging": {"log_interval": 4, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def megavlm(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``megavlm ARGUMENTS`` to its end; output and errors together in ``stdout``."""

    def run(*arguments: object, timeout: float = 100.0) -> subprocess.CompletedProcess[str]:
        return run_warm(arguments, tmp_path, timeout)

    return run
