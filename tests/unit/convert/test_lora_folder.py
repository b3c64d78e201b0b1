"""LoRA of a run trained on two ranks: merged into a dense model, as peft's folder and back, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from lora_run import train_lora
from safetensors.torch import load_file, save_file
from tiny_vlm import TINY
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.convert.families import FAMILIES
from megavlm.convert.folder import convert_folder
from megavlm.convert.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MergedWeights, export_adapter, read_adapter
from megavlm.convert.parts import ModelParts
from megavlm.convert.weight_map import to_theirs
from megavlm.models.language import LanguageConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 12, "target_modules": ALL, "layers_to_transform": [0, 2]}
LANGUAGE = {**TINY["language"], "lora": LORA}
CONFIG = LanguageConfig.model_validate(LANGUAGE)
SPLIT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    run_ranks(train_lora, 2, folder, {**TINY, "language": LANGUAGE}, SPLIT)
    return folder / "iter_0000003"


@pytest.fixture(scope="module")
def adapter(run: Path) -> Path:
    return export_adapter(run, run.parent.parent / "adapter", base_model="base")


def published(weights: CheckpointWeights) -> dict[str, Tensor]:
    """The decoder's dense weights as Qwen2ForCausalLM has them."""
    weight_map = FAMILIES["Qwen2ForCausalLM"].weight_map(ModelParts(language=CONFIG))
    dense = {key: weights[key] for key in weights if key.startswith("language.") and ".lora." not in key}
    return to_theirs(weight_map, dense)


def qwen2(tensors: dict[str, Tensor]) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    model.load_state_dict(tensors)
    return model


def test_merged_weights_are_the_base_and_the_product(run: Path, adapter: Path) -> None:
    base, merged = published(CheckpointWeights(run)), published(MergedWeights(run, CONFIG))
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    assert len(tensors) == 2 * 7 * 2
    adapted = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in tensors:
            a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
            assert b.abs().max() > 1e-3, "nothing was learned"
            # Worst seen: 0.
            torch.testing.assert_close(merged[name], weight + 4.0 * b @ a, rtol=1e-5, atol=1e-6)
            adapted += 1
        else:
            assert torch.equal(merged[name], weight), name
    assert adapted == 2 * 7


def test_peft_loads_the_folder(run: Path, adapter: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft to see it load the folder")
    tokens = torch.arange(40).view(2, 20) % 100
    merged = qwen2(published(MergedWeights(run, CONFIG)))
    base = qwen2(published(CheckpointWeights(run)))
    with torch.no_grad():
        plain, expected = base(tokens).logits, merged(tokens).logits
        found = peft.PeftModel.from_pretrained(base, adapter)(tokens).logits
    assert (plain - expected).abs().max() > 1e-2
    # Worst seen: 6e-7 of values up to 1.8.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_config_says_what_peft_asks_for(adapter: Path) -> None:
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["base_model_name_or_path"] == "base"
    assert {name: settings[name] for name in LORA} == {**LORA, "target_modules": sorted(ALL)}
    names = load_file(adapter / ADAPTER_WEIGHTS)
    assert names["base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight"].shape == (3, 32)
    assert names["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 3)


def test_folder_comes_back_bit_by_bit(run: Path, adapter: Path) -> None:
    weights, back = CheckpointWeights(run), read_adapter(adapter, CONFIG)
    assert back.keys() == {key for key in weights if ".lora." in key}
    assert all(torch.equal(back[key], weights[key]) for key in back)


def test_convert_writes_the_adapter(run: Path, adapter: Path, tmp_path: Path) -> None:
    written = convert_folder(run, tmp_path / "adapter", part="lora")
    assert (written / ADAPTER_WEIGHTS).read_bytes() == (adapter / ADAPTER_WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"--dtype=bf16: is not for an adapter \(--part=lora\)"):
        convert_folder(run, tmp_path / "other", part="lora", dtype="bf16")


def edited(adapter: Path, target: Path, settings: dict[str, Any], change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the folder with other settings and tensors."""
    target.mkdir()
    old = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (target / ADAPTER_CONFIG).write_text(json.dumps({**old, **settings}))
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, target / ADAPTER_WEIGHTS)
    return target


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: list[tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = [
    ({"peft_type": "IA3"}, lambda t: None, r"peft_type='IA3' is not LORA"),
    ({"use_dora": True}, lambda t: None, r"use_dora=True has no counterpart here"),
    ({"modules_to_save": ["lm_head"]}, lambda t: None, r"modules_to_save=\['lm_head'\] has no counterpart"),
    ({"r": 4}, lambda t: None, r"r=4, and model\.language\.lora\.r=3"),
    ({"lora_alpha": 3}, lambda t: None, r"lora_alpha=3, and model\.language\.lora\.lora_alpha=12"),
    ({}, lambda t: t.pop(Q0), r"lacks .*q_proj.lora_A.weight of LoRA \(28 tensors wanted, 27 found\)"),
    (
        {},
        lambda t: t.update({Q0: torch.zeros(3, 40)}),
        r"lora_A\.weight has shape \(3, 40\), and the model's has \(3, 32\)",
    ),
    ({}, lambda t: t.update({Q0 + "x": torch.zeros(1)}), r"1 tensors are not in the model's LoRA, first .*weightx"),
    ({}, lambda t: t[Q0].fill_(float("nan")), r"q_proj\.lora_A\.weight holds numbers that are not finite"),
]


@pytest.mark.parametrize(("settings", "change", "message"), REFUSED)
def test_other_adapters_are_refused(
    adapter: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    change: Callable[[dict[str, Tensor]], Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        read_adapter(edited(adapter, tmp_path / "edited", settings, change), CONFIG)


def test_damaged_files_are_refused(adapter: Path, tmp_path: Path) -> None:
    folder = edited(adapter, tmp_path / "cut", {}, lambda tensors: None)
    path = folder / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: cannot be read: .* Take the folder anew"):
        read_adapter(folder, CONFIG)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter(folder, CONFIG)


def test_what_does_not_fit_the_model_is_refused(run: Path, adapter: Path, tmp_path: Path) -> None:
    other = LanguageConfig.model_validate({**LANGUAGE, "lora": {**LORA, "layers_to_transform": [0, 1]}})
    with pytest.raises(ValueError, match=r"lacks .*layers\.1\..* of LoRA \(28 tensors wanted, 28 found\)"):
        MergedWeights(run, other)
    with pytest.raises(ValueError, match=r"is LoRA, and the model has none"):
        read_adapter(adapter, LanguageConfig.model_validate(TINY["language"]))
    with pytest.raises(ValueError, match=r"source=.*nothing: holds no checkpoint"):
        export_adapter(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
