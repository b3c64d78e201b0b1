"""Folders of the original InternVL release and of NVLM-D, whose own code is never run."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hf_folder import assert_same_tensors, edit_config, tensors_of
from published import make_internvl
from safetensors.torch import save_file
from torch import Tensor

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe
from megavlm.convert import internvl, nvlm
from megavlm.convert.folder import convert_folder
from megavlm.convert.parts import ModelFile
from megavlm.convert.weight_map import to_ours, to_theirs

ORIGINAL_VISION = {
    "image_size": 56,
    "num_hidden_layers": 2,
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_attention_heads": 5,
}


def original_folder(folder: Path, architecture: str) -> Mapping[str, Tensor]:
    """A folder of the original release with random weights; returns them under our keys."""
    published = make_internvl()
    model, text = published.config, published.model.config.get_text_config().to_dict()
    is_nvlm = architecture == "NVLM_D"
    ours = to_ours(published.weight_map, published.model.state_dict())
    if is_nvlm:
        width, hidden = model.language.ffn_hidden_size, model.language.hidden_size
        ours = {key: tensor for key, tensor in ours.items() if not (key.startswith("connector.") and "bias" in key)}
        ours |= {
            "connector.layernorm.bias": torch.randn(160),
            "connector.linear_fc1.weight": torch.randn(width, 160),
            "connector.linear_fc2.weight": torch.randn(hidden, width),
        }
    table = nvlm.weight_map(model) if is_nvlm else internvl.original_weight_map(model)
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in to_theirs(table, ours).items()}, folder / "model.safetensors"
    )
    config = {
        "architectures": [architecture],
        "auto_map": {"AutoModel": "modeling.Never"},
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "force_image_size": 56,
        "llm_config": text | {"architectures": ["Qwen2ForCausalLM"]},
        "vision_config": ORIGINAL_VISION,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return ours


@pytest.mark.parametrize("architecture", ["InternVLChatModel", "NVLM_D"])
def test_the_original_releases_come_in(architecture: str, tmp_path: Path) -> None:
    ours = original_folder(tmp_path / "hf", architecture)
    weights = CheckpointWeights(convert_folder(tmp_path / "hf", tmp_path / "run"))
    assert_same_tensors({key: weights[key] for key in weights}, ours)
    model = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model.whole()
    assert (model.connector.bias, model.connector.ffn_hidden_size) == {
        "InternVLChatModel": (True, 32),
        "NVLM_D": (False, 48),
    }[architecture]


def test_dummy_heads_stand_last_in_each_of_queries_keys_and_values(tmp_path: Path) -> None:
    original_folder(tmp_path / "hf", "NVLM_D")
    weight = tensors_of(tmp_path / "hf")["vision_model.encoder.layers.0.attn.qkv.weight"]
    assert weight.shape == (3 * 12 * 8, 40)
    heads_used = weight.view(3, 12, 8 * 40).any(-1)
    assert heads_used.tolist() == [[True] * 5 + [False] * 7] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v1"}, r"ps_version='v1' \(supported: 'v2'\)"),
        ({"downsample_ratio": 0.25}, r"downsample_ratio=0\.25"),
        ({"force_image_size": 28}, r"force_image_size=28 \(supported: vision_config's 56\)"),
        (
            {"llm_config__architectures": ["InternLM2ForCausalLM"]},
            r"architectures='InternLM2ForCausalLM' \(supported: L",
        ),
        ({"vision_config__norm_type": "batch_norm"}, r"vision_config: norm_type='batch_norm'"),
        ({"llm_config": None}, r"has no vision_config or no llm_config"),
        # the other release's number of heads
        ({"architectures": ["NVLM_D"]}, r"the given weights lack|has shape"),
    ],
)
def test_what_an_original_release_may_not_say(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    original_folder(tmp_path / "hf", "InternVLChatModel")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_dummy_heads_have_to_be_there(tmp_path: Path) -> None:
    original_folder(tmp_path / "hf", "NVLM_D")
    edit_config(tmp_path / "hf", vision_config__num_attention_heads=4)
    with pytest.raises(ValueError, match=r"has shape \(\d+, \d+\), and dimension \d of 4 heads with 7 dummies has"):
        convert_folder(tmp_path / "hf", tmp_path / "run")
