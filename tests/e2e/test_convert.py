"""``megavlm convert``: out of a trained run, back in, and on with training."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from command_line import REPOSITORY, assert_one_error, command_environment, losses
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megavlm.convert.folder import convert_folder

Run = Callable[..., subprocess.CompletedProcess[str]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_receipt(path: Path) -> None:
    receipt = json.loads(path.read_text(encoding="utf-8"))
    assert receipt["holds"]
    assert all(row["bit_equal"] for row in receipt["tensors"])
    names = ["sentence 1", "sentence 2", "sentence 3", "picture 1", "picture 2"]
    assert [row["name"] for row in receipt["outputs"]] == names
    # Worst seen: 2.2e-7.
    assert max(row["max_rel"] for row in receipt["outputs"]) < 5e-6


def test_a_trained_model_goes_out_and_comes_back(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tree["model"]["connector"] = {"kind": "mlp", "bias": True}  # as InternVL's
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    result = megavlm("train", recipe, "training.train_iters=4")
    assert result.returncode == 0, result.stdout

    result = megavlm("convert", "run", "hf", "--max-shard-size", "60KB", "--verify")
    assert result.returncode == 0, result.stdout
    assert "receipt: holds, for tensors and logits" in result.stdout
    check_receipt(tmp_path / "hf" / "receipt.json")
    assert "InternVLForConditionalGeneration" in result.stdout
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.model"} <= names
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.text_config.max_position_embeddings == tree["data"]["seq_length"]

    # the tool is the same command
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), "hf", "again", "--recipe", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        env=command_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    convert_folder(tmp_path / "again", tmp_path / "hf_again", max_shard_size="1GB")
    first, second = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "hf_again")
    assert (tmp_path / "hf_again" / "model.safetensors").exists()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    assert_one_error(megavlm("convert", "hf", "again"), "megavlm convert: error: target=again: exists already")

    start = ("checkpoint.pretrained_checkpoint=again", "training.optimizer.lr_warmup_iters=0")
    result = megavlm("train", recipe, "training.train_iters=1", f"checkpoint.save={tmp_path / 'next'}", *start)
    assert result.returncode == 0, result.stdout
    # a model that starts from trained weights begins near where the other ended, not near ln(290) = 5.7
    assert losses(tmp_path / "next")[0][1] < losses(tmp_path / "run")[1][1]
