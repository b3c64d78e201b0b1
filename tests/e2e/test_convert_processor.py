"""An exported folder answers as the run does, in a process that cannot import MegaVLM."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from PIL import Image

from megavlm.config import load_recipe
from megavlm.convert.folder import convert_folder
from megavlm.data import SampleProcessor, parse_conversation
from megavlm.recipe import Recipe

NUM_NEW_TOKENS = 12
ELSEWHERE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megavlm", "megatron"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, num_new_tokens, trusted = sys.argv[1], int(sys.argv[2]), sys.argv[3].split()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True if "processor" in trusted else None)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True if "model" in trusted else None)
answers = []
for messages in json.load(sys.stdin):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options)
    ids = model.generate(**inputs, max_new_tokens=num_new_tokens)[0, inputs["input_ids"].shape[1] :]
    pixels = inputs.get("pixel_values")
    answers.append(
        {
            "prompt": inputs["input_ids"][0].tolist(),
            "num_tiles": 0 if pixels is None else len(pixels),
            "pixel_sum": 0 if pixels is None else pixels.double().sum().item(),
            "answer": ids.tolist(),
            "text": processor.decode(ids, skip_special_tokens=True),
        }
    )
print(json.dumps({"processor": type(processor).__name__, "model": type(model).__name__, "answers": answers}))
"""
LLAVA = {
    "vision": {"kind": "clip", "image_size": 28, "patch_size": 7, "num_layers": 2, "select_layer": -2}
    | {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2},
    "connector": {"kind": "mlp", "bias": True, "layernorm": False, "pixel_shuffle_ratio": 1.0},
}
BROKEN = "\ufffd"
"""What a decoder writes for bytes that make no character; the two do not agree how many of them they spoil."""
PLAIN = {"tiling": {"kind": "whole"}, "tile_tags": "none", "image_wrapper": "none"}
OWN_MODEL = "MegaVLMForConditionalGeneration"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, str]]] = {
    # the processor of transformers: no code of the folder is run
    "llava": (LLAVA, PLAIN, "", ("LlavaProcessor", "LlavaForConditionalGeneration")),
    "internvl": (
        {"connector": {"kind": "mlp", "bias": True}},
        {},
        "processor",
        ("MegaVLMProcessor", "InternVLForConditionalGeneration"),
    ),
    "X": ({"fusion": {"kind": "cross_attention"}}, {}, "processor model", ("MegaVLMProcessor", OWN_MODEL)),
    "H": ({"fusion": {"kind": "hybrid"}}, {}, "processor model", ("MegaVLMProcessor", OWN_MODEL)),
}
"""Name -> changes to the recipe's model and data, whose code is trusted, and the classes that must come of it."""


def ask_elsewhere(folder: Path, questions: list[list[dict[str, Any]]], trusted: str, cwd: Path) -> dict[str, Any]:
    """Answers of the exported folder, from an isolated process in another directory."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(folder), str(NUM_NEW_TOKENS), trusted],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_an_exported_folder_answers_alone(
    name: str, megavlm: Callable[..., subprocess.CompletedProcess[str]], recipe: Path, tmp_path: Path
) -> None:
    model, data, trusted, classes = CASES[name]
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tree["model"] |= model
    tree["data"] |= data
    if "fusion" in model:
        tree["model"]["fusion"]["gate_init"] = 1.0
        tree["training"]["trainable"].append("cross_attention")
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    few = ("training.train_iters=2", "training.optimizer.lr_warmup_iters=1", "checkpoint.save_interval=null")
    result = megavlm("train", recipe, *few)
    assert result.returncode == 0, result.stdout
    is_stock = "processor" not in trusted
    turns = questions(tmp_path, is_stock=is_stock)
    rows = [as_row(messages) for messages in turns]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ("--jsonl", "asked.jsonl", "--output", "said.jsonl", "--max-new-tokens", NUM_NEW_TOKENS)
    result = megavlm("generate", "run", *options)
    assert result.returncode == 0, result.stdout
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]

    folder = convert_folder(tmp_path / "run", tmp_path / "hf")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = ask_elsewhere(folder, turns, trusted, elsewhere)
    assert (found["processor"], found["model"]) == classes
    answers = found["answers"]

    run = load_recipe(recipe, (), Recipe)
    vision, route = run.model.vision, run.model.fusion.tile_route
    tokenizer = run.tokenizer.build()
    processor = SampleProcessor(run.data, tokenizer, vision.image_size, run.model.tokens_per_tile, route)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.image_mean, vision.image_std))
    for row, answer, line in zip(rows, answers, said, strict=True):
        sample = processor.prompt("row", parse_conversation(row, "row", tmp_path, needs_answer=False)).sample
        assert answer["prompt"] == sample.tokens.tolist()
        assert answer["num_tiles"] == sample.tiles.shape[0]
        assert answer["pixel_sum"] == ((sample.tiles.float() / 255 - mean) / std).double().sum().item()
        assert tokenizer.decode(answer["answer"]) == line["answer"]
        assert answer["text"] == line["answer"] or BROKEN in answer["text"]
    assert [answer["num_tiles"] for answer in answers] == ([1, 0, 2] if is_stock else [4, 0, 7])
    assert any(line["answer"] for line in said)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == sorted(processor.stop_token_ids)

    # what nobody trained goes out with the files that it came with
    convert_folder(folder, tmp_path / "again")
    back = convert_folder(tmp_path / "again", tmp_path / "hf_again")
    for kept in ("processor_config.json", "processing_megavlm.py", "chat_template.jinja", "tokenizer.json"):
        assert (back / kept).read_bytes() == (folder / kept).read_bytes()


def questions(folder: Path, *, is_stock: bool) -> list[list[dict[str, Any]]]:
    """An image of several tiles, a text, two images; for our processor also what stock ones read otherwise."""
    random = numpy.random.default_rng(3)
    for name, shape in {"wide.png": (40, 120, 3), "tall.png": (70, 30, 3 if is_stock else 4)}.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)).save(folder / name)
    pictures = [{"type": "image", "path": str(folder / name)} for name in ("wide.png", "tall.png")]
    words = "what is number 11" if is_stock else "what is <|im_end|> number 11"
    return [
        [{"role": "user", "content": [pictures[0], {"type": "text", "text": "\nwhat is number 3"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "what is number 7"}]}],
        [{"role": "user", "content": [*pictures, {"type": "text", "text": words}]}],
    ]


def as_row(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The same as a row of a data file."""
    content = [
        {"type": "image", "image": part["path"]} if part["type"] == "image" else part for part in messages[0]["content"]
    ]
    return {"messages": [{"role": "user", "content": content}]}
