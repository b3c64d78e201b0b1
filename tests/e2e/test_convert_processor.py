"""An exported folder answers as the run does, in a process that cannot import MegaVLM."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
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

folder, num_new_tokens = sys.argv[1], int(sys.argv[2])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder)
answers = []
for messages in json.load(sys.stdin):
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=num_new_tokens)[0, inputs["input_ids"].shape[1] :]
    pixels = inputs.get("pixel_values")
    answers.append(
        {
            "prompt": inputs["input_ids"][0].tolist(),
            "num_tiles": 0 if pixels is None else len(pixels),
            "pixel_sum": 0 if pixels is None else pixels.double().sum().item(),
            "answer": processor.decode(ids, skip_special_tokens=True),
        }
    )
print(json.dumps(answers))
"""


def ask_elsewhere(folder: Path, questions: list[list[dict[str, Any]]], cwd: Path) -> list[dict[str, Any]]:
    """Answers of the exported folder, from an isolated process in another directory."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(folder), str(NUM_NEW_TOKENS)],
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


def test_an_exported_folder_answers_alone(
    megavlm: Callable[..., subprocess.CompletedProcess[str]], recipe: Path, tmp_path: Path
) -> None:
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tree["model"]["connector"] = {"kind": "mlp", "bias": True}  # as InternVL's
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    result = megavlm("train", recipe, "training.train_iters=4", "checkpoint.save_interval=4")
    assert result.returncode == 0, result.stdout
    random = numpy.random.default_rng(3)
    for name, shape in {"wide.png": (40, 120, 3), "tall.png": (70, 30, 4)}.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)).save(tmp_path / name)
    pictures = [{"type": "image", "path": str(tmp_path / name)} for name in ("wide.png", "tall.png")]
    turns = [
        [{"role": "user", "content": [pictures[0], {"type": "text", "text": "\nwhat is number 3"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "what is number 7"}]}],
        [{"role": "user", "content": [*pictures, {"type": "text", "text": "what is <|im_end|> number 11"}]}],
    ]
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": part["path"]} if part["type"] == "image" else part
                        for part in messages[0]["content"]
                    ],
                }
            ]
        }
        for messages in turns
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ("--jsonl", "asked.jsonl", "--output", "said.jsonl", "--max-new-tokens", NUM_NEW_TOKENS)
    result = megavlm("generate", "run", *options)
    assert result.returncode == 0, result.stdout
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]

    folder = convert_folder(tmp_path / "run", tmp_path / "hf")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    answers = ask_elsewhere(folder, turns, elsewhere)

    run = load_recipe(recipe, (), Recipe)
    processor = SampleProcessor(run.data, run.tokenizer.build(), run.model.vision.image_size, run.model.tokens_per_tile)
    vision = run.model.vision
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.image_mean, vision.image_std))
    for row, answer, line in zip(rows, answers, said, strict=True):
        sample = processor.prompt("row", parse_conversation(row, "row", tmp_path, needs_answer=False)).sample
        assert answer["prompt"] == sample.tokens.tolist()
        assert answer["num_tiles"] == sample.tiles.shape[0]
        assert answer["pixel_sum"] == ((sample.tiles.float() / 255 - mean) / std).double().sum().item()
        assert answer["answer"] == line["answer"]
    assert [answer["num_tiles"] for answer in answers] == [4, 0, 7]
    assert any(line["answer"] for line in said)
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == sorted(processor.stop_token_ids)

    # what nobody trained goes out with the files that it came with
    convert_folder(folder, tmp_path / "again")
    back = convert_folder(tmp_path / "again", tmp_path / "hf_again")
    for name in ("processor_config.json", "processing_megavlm.py", "chat_template.jinja", "tokenizer.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
