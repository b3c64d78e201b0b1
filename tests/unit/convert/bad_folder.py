"""Ways in which a Hugging Face folder can be bad, and what is said of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_folder import edit_config, edit_tensors
from safetensors.torch import load_file


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00\x01\x00")


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops")


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def split(folder: Path) -> dict[str, str]:
    """Make two files and an index of the one file."""
    all_tensors = load_file(folder / "model.safetensors")
    names = sorted(all_tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        edited = {name: all_tensors[name] for name in part}
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        (folder / file).write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").rename(folder / "whole")
        (folder / file).rename(folder / "model.safetensors")
        edit_tensors(folder, lambda held, edited=edited: [held.pop(name) for name in held.keys() - edited.keys()])
        (folder / "model.safetensors").rename(folder / file)
        (folder / "whole").rename(folder / "model.safetensors")
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def missing_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_index(folder: Path) -> None:
    index = split(folder)
    index["lm_head.weight"] = next(file for file in set(index.values()) if file != index["lm_head.weight"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


BAD_FOLDERS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "config_damaged": ("llama", damaged_config, r"config\.json: is damaged"),
    "config_missing_value": ("llama", config(hidden_size="wide"), r"config\.json: is not one of a llama model .*wide"),
    "architecture": ("llama", config(architectures=["GPT2LMHeadModel"]), r"\['GPT2LMHeadModel'\].*Supported: Llama"),
    "no_architecture": ("llama", config(architectures=None), r"architectures=\[\] \(model_type='llama'\)"),
    "activation": ("llama", config(hidden_act="gelu"), r"hidden_act='gelu' \(supported: 'silu'\)"),
    "bias": ("llama", config(attention_bias=True), r"attention_bias=True \(supported: False\)"),
    "mlp_bias": ("llama", config(mlp_bias=True), r"mlp_bias=True"),
    "rope": (
        "llama",
        config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        r"rope_type='linear' \(supported: 'default', 'llama3', 'dynamic'\)",
    ),
    "llama3_rope": ("llama_3_1", config(rope_parameters__high_freq_factor=8.0), r"high_freq_factor=8\.0 .*4\.0"),
    "theta": ("llama", config(rope_parameters__rope_theta=10000.5), r"rope_theta=10000\.5 \(supported: whole"),
    "sliding_window": (
        "mistral",
        config(sliding_window=16),
        r"sliding_window=16 \(below max_position_embeddings=131072",
    ),
    "qwen_window": ("qwen2", config(use_sliding_window=True), r"use_sliding_window=True"),
    "two_at_once": ("llama", config(hidden_act="gelu", mlp_bias=True), r"hidden_act='gelu'.*; mlp_bias=True"),
    "text_model": ("internvl", config(text_config__model_type="gemma2"), r"text_config\.model_type='gemma2'"),
    "ratio": ("internvl", config(downsample_ratio=0.25), r"downsample_ratio=0\.25 \(supported: 0\.5\)"),
    "strategy": ("internvl", config(vision_feature_select_strategy="full"), r"select_strategy='full'"),
    "feature_layer": ("internvl", config(vision_feature_layer=[-1, -2]), r"vision_feature_layer=\[-1, -2\]"),
    "pooling": ("internvit", config(use_mean_pooling=False), r"use_mean_pooling=False"),
    "oblong": ("internvit", config(image_size=[56, 28]), r"image_size=\[56, 28\] \(supported: squares\)"),
    "clip_activation": ("clip_vision", config(hidden_act="relu"), r"hidden_act='relu'.*'quick_gelu', 'gelu'"),
    "siglip_activation": (
        "siglip",
        config(vision_config__hidden_act="gelu"),
        r"hidden_act='gelu'.*'gelu_pytorch_tanh'",
    ),
    "llava_layers": (
        "llava",
        config(vision_feature_layer=[-2, -5]),
        r"vision_feature_layer=\[-2, -5\] \(supported: one",
    ),
    "llava_first_layer": (
        "llava",
        config(vision_feature_layer=2),
        r"vision_feature_layer=2 \(supported: one number below 0",
    ),
    "llava_activation": (
        "llava",
        config(projector_hidden_act="relu"),
        r"projector_hidden_act='relu' \(supported: 'gelu'",
    ),
    "llava_tower": (
        "llava",
        config(vision_config={"model_type": "siglip2_vision_model"}),
        r"vision_config\.model_type='siglip2_vision_model' \(supported: clip_vision_model, siglip_vision_model\)",
    ),
    "llava_text": ("llava", config(text_config__model_type="gemma2"), r"text_config\.model_type='gemma2'"),
    "llava_first_patch": (
        "llava_siglip",
        config(vision_feature_select_strategy="default"),
        r"vision_feature_select_strategy='default' \(supported: 'full'\)",
    ),
    "llava_too_deep": ("llava", config(vision_feature_layer=-4), r"vision_feature_layer=-4 \(supported: -1 to -3\)"),
    "cut_short": ("llama", cut_short, r"model\.safetensors: has \d+ bytes, and should have \d+"),
    "cut_to_nothing": ("llama", cut_to_nothing, r"has 3 bytes and announces a header of 256: it is cut short"),
    "no_header": ("llama", no_header, r"its header is damaged"),
    "only_pickles": ("llama", only_pickles, r"pickles \(pytorch_model\.bin\).*to safetensors first"),
    "no_weights": ("llama", lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors and no"),
    "missing_shard": ("llama", missing_shard, r"1 of the 2 files .*first model-00002-of-00002\.safetensors"),
    "wrong_index": ("llama", wrong_index, r"lacks lm_head\.weight, which model\.safetensors\.index\.json says"),
    "index_outside": ("llama", index_outside, r"'\.\./a\.safetensors', which is not a file of the folder"),
    "integers": (
        "llama",
        tensors(lambda held: held.update({"model.norm.weight": held["model.norm.weight"].to(torch.int8)})),
        r"decoder\.final_layernorm\.weight is of type torch\.int8.*Quantised",
    ),
    "missing_tensor": (
        "llama",
        tensors(lambda held: held.pop("model.layers.1.mlp.up_proj.weight")),
        r"layers\.1\.mlp\.linear_fc1\.weight: the given weights lack model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "unknown_tensor": (
        "llama",
        tensors(lambda held: held.update({"model.adapter.weight": torch.zeros(1)})),
        r"1 of the given tensors have no place in the model: model\.adapter\.weight",
    ),
    "untied": (
        "llama_tied",
        tensors(lambda held: held.update({"lm_head.weight": torch.zeros(50, 32)})),
        r"no place in the model: lm_head\.weight",
    ),
    "wrong_shape": (
        "llama",
        tensors(lambda held: held.update({"model.norm.weight": torch.zeros(31)})),
        r"final_layernorm\.weight has shape \(31,\), and the model's has \(32,\)",
    ),
    "vocabulary_of_the_weights": (
        "llama",
        config(vocab_size=49),
        r"has shape \(50, 32\), and the model's has \(49, 32\)",
    ),
    "layers": ("llama", config(num_hidden_layers=3), r"layers\.2\..* the given weights lack"),
    "fewer_layers": ("llama", config(num_hidden_layers=1), r"\d+ of the given tensors have no place"),
}
