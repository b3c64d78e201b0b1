"""The commands of examples/real_weights/README.md, word for word, on made-up weights in place of downloaded ones."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from command_line import REPOSITORY, command_environment
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

README = REPOSITORY / "examples" / "real_weights" / "README.md"
# SmolLM2's and stories15M's: the README's commands make room for one token more
VOCAB_SIZES = {"smollm2": 49152, "stories15m": 32000}
NEEDS_NETWORK = ("bin/pip", "examples/real_weights/fetch.py")
WIDTH = 32
SMALL_MODEL = [
    *(f"model.{part}.{name}={WIDTH}" for part in ("vision", "language") for name in ("hidden_size", "ffn_hidden_size")),
    "model.vision.pretrained_image_size=70",
    *("model.vision.num_layers=2", "model.vision.num_attention_heads=2"),
    *("model.language.num_layers=2", "model.language.num_attention_heads=2", "model.language.num_query_groups=1"),
    *("training.global_batch_size=4", "training.micro_batch_size=2"),
]
SYSTEM = [setting for setting in SMALL_MODEL if "num_query_groups" not in setting]
SMALL = {
    "examples/real_weights/untrained.yaml": SMALL_MODEL,
    "examples/real_weights/stage1.yaml": [*SMALL_MODEL, "training.train_iters=20"],
    "examples/llava/real_stage1.yaml": [*SYSTEM, "training.train_iters=20"],
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    symbols = ["<|im_start|>", "<|im_end|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(symbols)}
    vocabulary |= {f"unused {number}": number for number in range(len(symbols), vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(symbols[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A fresh clone in which fetch.py has run, with a tenth of everything."""
    torch.manual_seed(0)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    data = tmp_path / "data" / "real_weights"
    shape = {"num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**shape, mlp_ratio=1, image_size=70, patch_size=14)).save_pretrained(data / "dinov2")
    for name, vocab_size in VOCAB_SIZES.items():
        llama = LlamaConfig(
            **shape,
            intermediate_size=WIDTH,
            num_key_value_heads=1 if name == "smollm2" else 2,
            vocab_size=vocab_size,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0 if name == "smollm2" else 10000.0},
        )
        LlamaForCausalLM(llama).save_pretrained(data / name)
        write_tokenizer(data / name, vocab_size)
    images = data / "emoji" / "images"
    images.mkdir(parents=True)
    names = ["red", "green", "blue", "dark", "light"]
    random = np.random.default_rng(0)
    for name in names:
        Image.fromarray(random.integers(0, 256, (32, 32, 4), dtype=np.uint8)).save(images / f"{name}.webp")
    for file, shown in (("train", names), ("valid", names), ("valid_other_image", names[1:] + names[:1])):
        rows = [
            {
                "id": name,
                "image": f"images/{image}.webp",
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": name}],
            }
            for name, image in zip(names, shown, strict=True)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / "emoji" / f"{file}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.timeout(1200)
def test_the_readme_from_weights_to_captions(workplace: Path) -> None:
    lines = [line for line in commands() if not any(name in line for name in NEEDS_NETWORK)]
    assert len(lines) == len(commands()) - len(NEEDS_NETWORK)
    for line in lines:
        program, *arguments = shlex.split(line)
        arguments += [extra for name, extras in SMALL.items() if name in arguments for extra in extras]
        start = [sys.executable, "-m", "megavlm"] if program.endswith("bin/megavlm") else [sys.executable]
        result = subprocess.run(
            [*start, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            env=command_environment(),
            cwd=workplace,
            check=False,
        )
        assert result.returncode == 0, f"{line}:\n{result.stdout}"
    folder = workplace / "runs" / "real_weights" / "captions"
    found = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    before, after = found["losses"]
    assert (before["run"], after["run"]) == ("real_weights/untrained", "real_weights/stage1")
    # An untrained model of 49153 tokens is near ln(49153) = 10.8; a fresh connector learns five names by heart.
    assert 10 < before["right_image"] < 12
    assert after["right_image"] < before["right_image"] - 0.1
    assert after["gap"] == pytest.approx(after["other_image"] - after["right_image"])
    assert [row["name"] for row in found["captions"]] == ["red", "green", "blue", "dark", "light"]
    with Image.open(folder / "captions.png") as picture:
        assert picture.width > 500
