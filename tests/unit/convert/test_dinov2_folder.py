"""Dinov2Model folders there and back, what their config.json may say, and what of ours they have no place for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder import assert_same_tensors, edit_config, tensors_of
from parity import randomize
from transformers import AutoModel, Dinov2Model
from transformers import Dinov2Config as PublishedConfig

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe
from megavlm.convert import dinov2
from megavlm.convert.config_of import architecture_of
from megavlm.convert.folder import convert_folder
from megavlm.convert.parts import ModelFile, ModelParts
from megavlm.convert.receipt import make_receipt
from megavlm.models.vision.dinov2 import Dinov2Config

SMALL: dict[str, Any] = {
    "image_size": 70,
    "patch_size": 14,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
}


def save(folder: Path, **changes: Any) -> Dinov2Model:
    model = Dinov2Model(PublishedConfig(**SMALL | changes))
    randomize(model)
    model.save_pretrained(folder)
    return model


def vision_of(run: Path) -> Dinov2Config:
    vision = load_recipe(run / "model.yaml", (), ModelFile).model.vision
    assert isinstance(vision, Dinov2Config)
    return vision


@pytest.mark.parametrize("is_giant", [False, True])
def test_a_folder_comes_in_and_goes_out_bit_by_bit(is_giant: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "hf", use_swiglu_ffn=is_giant)
    convert_folder(tmp_path / "hf", tmp_path / "run", ["model.vision.image_size=42"])
    vision = vision_of(tmp_path / "run")
    assert (vision.image_size, vision.pretrained_image_size, vision.num_patches) == (42, 70, 9)
    assert vision.ffn_hidden_size == (64 if is_giant else 96)

    convert_folder(tmp_path / "run", tmp_path / "again")
    before = tensors_of(tmp_path / "hf")
    before.pop("embeddings.mask_token")  # of pretraining: has no place
    assert_same_tensors(tensors_of(tmp_path / "again"), before)
    loaded, info = AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded, Dinov2Model)
    tiles = torch.randn(1, 3, 42, 42)
    torch.testing.assert_close(loaded.eval()(tiles)[0], model.eval()(tiles)[0], rtol=0, atol=0)


def test_the_receipt_compares_features_on_a_stretched_grid(tmp_path: Path) -> None:
    save(tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run", ["model.vision.image_size=42"])
    receipt = make_receipt(tmp_path / "hf", tmp_path / "run")
    receipt.require()
    assert [row.num_positions for row in receipt.outputs] == [9, 9]


@pytest.mark.parametrize("override", ["select_layer=-2", "post_layernorm=false"])
def test_what_the_features_do_not_pass_is_carried_along(override: str, tmp_path: Path) -> None:
    save(tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run", [f"model.vision.{override}"])
    run = CheckpointWeights(tmp_path / "run" / "release")
    assert not any("layers.1." in key if "layer=" in override else "post_layernorm" in key for key in run)
    convert_folder(tmp_path / "run", tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "hf").keys() - {"embeddings.mask_token"}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_hidden_layers"] == 2


def test_without_an_override_the_tile_is_as_large_as_the_positions(tmp_path: Path) -> None:
    save(tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    assert vision_of(tmp_path / "run").image_size == 70


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, r"config\.json: hidden_act='relu' \(supported: 'gelu'\)\. MegaVLM has no model"),
        ({"num_channels": 1}, r"num_channels=1 \(supported: 3\)"),
        ({"image_size": [70, 56]}, r"image_size=\[70, 56\] \(supported: squares\)"),
        ({"image_size": 84}, r"vision\.embedding\.positions has shape \(26, 48\), and the model's has \(37, 48\)"),
        ({"mlp_ratio": 3}, r"linear_fc1\.\w+ has shape \(96.*, and the model's has \(144"),
    ],
)
def test_folders_of_other_models_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "hf")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_positions_of_another_grid_than_the_recipes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "hf")
    message = r"model\.vision\.pretrained_image_size=42, and config\.json says 70"
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "hf", tmp_path / "run", ["model.vision.pretrained_image_size=42"])


@pytest.mark.parametrize(
    ("gated", "width", "fits"),
    [(False, 96, True), (False, 100, False), (True, 64, True), (True, 96, True), (True, 72, False)],
)
def test_only_widths_of_a_whole_mlp_ratio_can_be_written(gated: bool, width: int, fits: bool) -> None:
    config = Dinov2Config(
        image_size=70,
        patch_size=14,
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=width,
        num_attention_heads=3,
        gated_linear_unit=gated,
    )
    if fits:
        published = PublishedConfig(**dinov2.published_config(config))
        model = Dinov2Model(published)
        mlp = model.encoder.layer[0].mlp
        assert (mlp.down_proj if gated else mlp.fc2).in_features == width
        return
    with pytest.raises(
        ValueError, match=rf"model\.vision\.ffn_hidden_size={width} \(with \w+ only what a whole mlp_ratio"
    ):
        architecture_of(ModelParts(vision=config))
