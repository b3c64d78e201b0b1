"""What our models have no use for: carried from an import to an export, made up for where nothing was carried."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder import BOTH_TOWERS, as_published, assert_same_tensors, edit_config, edit_tensors, save, tensors_of
from safetensors.torch import load_file
from test_model_parity import make_batch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionModel, SiglipVisionModel

from megavlm.checkpoint.manifest import write_manifest
from megavlm.convert.carried import CARRIED_NAME
from megavlm.convert.folder import convert_folder

VISION_CLASSES: dict[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
PICTURE = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def carried_by(run: Path) -> dict[str, Tensor]:
    path = run / "release" / CARRIED_NAME
    return load_file(path) if path.exists() else {}


def without_carried(run: Path) -> Path:
    """The run folder as if it had been trained: nothing of the published one beside the weights."""
    shutil.rmtree(run / "release" / "published")
    write_manifest(run / "release")
    return run


@pytest.mark.parametrize("family", sorted(BOTH_TOWERS))
def test_of_two_towers_the_vision_tower_comes_back_whole(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    overrides = ["model.vision.select_layer=-2", *(["model.vision.post_layernorm=false"] if family == "siglip" else [])]
    convert_folder(tmp_path / "hf", tmp_path / "run", overrides)
    assert not any("text" in key for key in carried_by(tmp_path / "run"))
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    tower = {name: t for name, t in tensors_of(tmp_path / "hf").items() if name.startswith("vision_model.")}
    assert_same_tensors(tensors_of(back), tower)
    loaded, info = VISION_CLASSES[family].from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tensors(loaded.state_dict(), published.vision_model.state_dict())
    assert type(AutoModel.from_pretrained(back)) is VISION_CLASSES[family]


@pytest.mark.parametrize("family", sorted(BOTH_TOWERS))
def test_what_was_not_carried_is_made_up_without_a_change_of_features(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    overrides = ["model.vision.select_layer=-2", *(["model.vision.post_layernorm=false"] if family == "siglip" else [])]
    convert_folder(tmp_path / "hf", tmp_path / "run", overrides)
    back = convert_folder(without_carried(tmp_path / "run"), tmp_path / "back")
    loaded, info = VISION_CLASSES[family].from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.num_hidden_layers == 1
    assert torch.equal(loaded.post_layernorm.weight, torch.ones(20))
    assert not loaded.post_layernorm.bias.any()
    with torch.no_grad():
        found = loaded(PICTURE, output_hidden_states=True).hidden_states[-1]
        expected = published.vision_model(PICTURE, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
def test_a_trained_llava_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf").eval()
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(without_carried(tmp_path / "run"), tmp_path / "back", ["tokenizer=null"])
    config = json.loads((back / "config.json").read_text())
    assert config["vision_feature_layer"] == -1
    assert config["vision_config"]["num_hidden_layers"] == (2 if family == "llava" else 3)
    edit_config(back, image_token_index=49)  # there is no tokenizer to ask for it
    loaded, info = AutoModelForImageTextToText.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    batch = make_batch(torch.Generator().manual_seed(5), config["vision_config"]["image_size"])
    with torch.no_grad():
        found, expected = (
            m.eval()(input_ids=batch.tokens, pixel_values=batch.tiles).logits for m in (loaded, published)
        )
    # The same class with the same weights: no difference is expected, the room is for another kernel's order of sums.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_tower_comes_out_of_a_whole_model(tmp_path: Path) -> None:
    published = save("llava", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", part="vision")
    loaded, info = CLIPVisionModel.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tensors(loaded.state_dict(), published.model.vision_tower.state_dict())


def test_half_of_a_layer_is_not_carried(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        del tensors["vision_tower.encoder.layers.2.self_attn.k_proj.weight"]

    save("llava", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", cut)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    assert "vision.encoder.layers.2.self_attention.linear_qkv.weight" not in carried_by(tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    expected = as_published("llava", tensors_of(tmp_path / "hf"))
    kept = {name: tensor for name, tensor in expected.items() if ".layers.2." not in name or "vision" not in name}
    assert_same_tensors(tensors_of(back), kept)


def test_the_types_of_what_is_carried_are_kept_or_changed(tmp_path: Path) -> None:
    def round_some(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "post_layernorm" not in name:
                tensors[name] = tensors[name].bfloat16()

    save("siglip_vision", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", round_some)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    assert carried_by(tmp_path / "run")["vision.head.probe"].dtype == torch.bfloat16
    expected = as_published("siglip_vision", tensors_of(tmp_path / "hf"))
    assert_same_tensors(tensors_of(convert_folder(tmp_path / "run", tmp_path / "back")), expected)
    wide = convert_folder(tmp_path / "run", tmp_path / "wide", dtype="fp32")
    assert_same_tensors(tensors_of(wide), {name: tensor.float() for name, tensor in expected.items()})


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    save("siglip_vision", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda held: held.update({"head.probe": torch.zeros(1, 1, 20, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"vision\.head\.probe is of type torch\.int8.*Quantised"):
        convert_folder(tmp_path / "hf", tmp_path / "run")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save("clip_vision", tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    path = checkpoint / CARRIED_NAME
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"unused\.safetensors"):
        convert_folder(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_both_ways_say_what_they_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("llava", tmp_path / "hf")
    with caplog.at_level(logging.INFO, logger="megavlm"):
        logging.getLogger("megavlm").addHandler(caplog.handler)
        convert_folder(tmp_path / "hf", tmp_path / "run")
        convert_folder(tmp_path / "run", tmp_path / "back")
        convert_folder(without_carried(tmp_path / "run"), tmp_path / "shorter")
        logging.getLogger("megavlm").removeHandler(caplog.handler)
    assert "14 that the model has no use for are carried in published/unused.safetensors" in caplog.text
    assert "14 tensors that the model has no use for are written as they came in" in caplog.text
    assert "with 2 of the 3 layers that it was published with" in caplog.text
    assert "vision.post_layernorm.weight, vision.post_layernorm.bias: the model has none" in caplog.text
