"""Bad folders and wrong requests: one sentence each, and nothing left behind."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_folder import BAD_FOLDERS
from hf_folder import save
from published import make_internvl

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import validate
from megavlm.convert.folder import convert_folder
from megavlm.convert.from_hf import import_folder
from megavlm.convert.write_hf import parse_size
from megavlm.recipe import Recipe


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused(case: str, tmp_path: Path) -> None:
    family, spoil, message = BAD_FOLDERS[case]
    save(family, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as caught:
        convert_folder(tmp_path / "hf", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "language"}, r"--part=language: is for the way to Hugging Face, and .* has a config\.json"),
        ({"max_shard_size": "1GB"}, r"--max-shard-size=1GB: is for the way to"),
        ({"dtype": "bf16"}, r"--dtype=bf16: is for the way to"),
        ({"overrides": ["model.language.vocab_size=49"]}, r"vocab_size=49: gives 49 .* has 50, of which none is cut"),
        ({"overrides": ["model.language.num_layers=3"]}, r"model\.language\.num_layers=3, and config\.json says 2"),
        ({"overrides": ["model.language.rotary_base=1"]}, r"rotary_base=1, and config\.json says 10000"),
        ({"overrides": ["model.language.layers=3"]}, r"model\.language\.layers=3: unknown key"),
    ],
)
def test_a_wrong_request_of_a_good_folder_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "hf", tmp_path / "run", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    for source in ("hf", "run"):
        with pytest.raises(ValueError, match=r"target=.*run: exists already"):
            convert_folder(tmp_path / source, tmp_path / "run")
    assert (tmp_path / "run" / "release").is_dir()


def test_a_target_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"target=.*file/run: cannot be written \(Not a directory\)"):
        convert_folder(tmp_path / "hf", tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_is_neither_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"source=.*{name}: holds neither a config\.json nor a checkpoint"):
        convert_folder(tmp_path / name, tmp_path / "back")
    with pytest.raises(ValueError, match=r"--recipe=a: is for the way from Hugging Face, and .* has no config\.json"):
        convert_folder(tmp_path / name, tmp_path / "back", recipe=Path("a"))


def recipe_of(model: dict[str, Any], trainable: tuple[str, ...] = ("connector",)) -> Recipe:
    tree = {
        "model": model,
        "tokenizer": {"kind": "huggingface", "path": "nowhere"},
        "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 64},
        "engine": {"kind": "megatron"},
        "training": {
            "trainable": list(trainable),
            "train_iters": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "optimizer": {"lr": 0.1},
        },
        "checkpoint": {"save": "nowhere"},
    }
    return validate(tree, Recipe, "test")


def changed(**changes: Any) -> dict[str, Any]:
    tree = make_internvl().config.model_dump(mode="json")
    for name, value in changes.items():
        part, field = name.split("__")
        tree[part][field] = value
    return tree


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (changed(language__num_layers=3), r"model\.language\.num_layers=3, and config\.json says 2"),
        (changed(language__num_query_groups=None), r"num_query_groups=4, and config\.json says 2"),
        (changed(language__rotary_base=9), r"rotary_base=9, and config\.json says 10000"),
        (changed(vision__layernorm_epsilon=1e-5), r"vision\.layernorm_epsilon=1e-05, and config\.json says 1e-06"),
        (changed(vision__select_layer=-2), r"vision\.select_layer=-2, and config\.json says -1"),
        (changed(connector__bias=False), r"connector\.bias=False, and config\.json says True"),
        (changed(connector__ffn_hidden_size=48), r"connector\.ffn_hidden_size=48, and config\.json says 32"),
        (
            changed(language__rotary_base=9, connector__bias=False),
            r"connector\.bias=False.*; model\.language\.rotary_base=9",
        ),
    ],
)
def test_a_recipe_of_another_model_is_refused(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    save("internvl", tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "run", recipe_of(model))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_recipe_of_another_vision_encoder_is_refused(tmp_path: Path) -> None:
    save("clip_vision", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"model\.vision\.kind='internvit', and config\.json says 'clip'"):
        import_folder(tmp_path / "hf", tmp_path / "run", recipe_of(changed()))


CANNOT: dict[str, tuple[list[str], str]] = {
    "fusion": (
        ["model.fusion={kind: cross_attention}"],
        r"model\.fusion\.kind='cross_attention' \(only decoder_only\)",
    ),
    "one_layer": (
        ["model.connector.num_layers=1", "model.connector.ffn_hidden_size=null"],
        r"model\.connector\.num_layers=1 \(only 2\)",
    ),
    "no_bias": (["model.connector.bias=false"], r"model\.connector\.bias=False \(only True\)"),
    "inner_width": (
        ["model.connector.ffn_hidden_size=48"],
        r"ffn_hidden_size=48 \(only model\.language\.hidden_size=32\)",
    ),
    "no_norm": (["model.connector.layernorm=false"], r"model\.connector\.layernorm=False"),
    "norm_epsilon": (["model.connector.layernorm_epsilon=1e-6"], r"layernorm_epsilon=1e-06 \(only 1e-05\)"),
    "two": (
        ["model.connector.bias=false", "model.connector.layernorm=false"],
        r"bias=False \(only True\); model\.connector\.layernorm=False",
    ),
    "more_layers": (["model.language.num_layers=3"], r"does not hold language\.decoder\.layers\.2"),
    "fewer_layers": (
        ["model.language.num_layers=1"],
        r"tensors are not in the model, first language\.decoder\.layers\.1",
    ),
    "wider": (["model.language.ffn_hidden_size=56"], r"has shape \(96, 32\), and the model's has \(112, 32\)"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_demanded_class_has_no_place_for_is_refused(case: str, tmp_path: Path) -> None:
    overrides, message = CANNOT[case]
    save("internvl", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "run", tmp_path / "back", overrides, architecture="InternVLForConditionalGeneration")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ValueError, match=r"--part=vision: the checkpoint holds language\. Choose"):
        convert_folder(tmp_path / "run", tmp_path / "back", part="vision")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file.name}: has changed since it was saved"):
        convert_folder(tmp_path / "run", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")

    def fail(weights: CheckpointWeights, key: str) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWeights, "__getitem__", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(tmp_path / "run", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("4096", 4096), ("20KB", 20_000), ("1T", 10**12)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 gigs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"--max-shard-size={re.escape(text)}: is not a number of bytes"):
        parse_size(text)
