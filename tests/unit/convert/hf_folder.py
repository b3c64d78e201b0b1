"""Small Hugging Face folders with random weights, of every family that is converted."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from parity import randomize
from published import (
    TEXT,
    make_internvl,
    make_internvl_tied,
    make_llama,
    make_llama_3_1,
    make_llama_tied,
    make_llava,
    make_llava_siglip,
    make_qwen2,
    make_qwen2_tied,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    MistralConfig,
    MistralForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

CLIP = {
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 40,
    "image_size": 28,
    "patch_size": 14,
}
INTERNVIT = {
    "image_size": 56,
    "patch_size": 14,
    "num_hidden_layers": 2,
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_attention_heads": 5,
}


def make_mistral() -> torch.nn.Module:
    return _randomized(MistralForCausalLM(MistralConfig(**TEXT, tie_word_embeddings=False, sliding_window=None)))


def make_clip_vision() -> torch.nn.Module:
    return _randomized(CLIPVisionModel(CLIPVisionConfig(**CLIP)))


def make_clip() -> torch.nn.Module:
    text = {name: value for name, value in CLIP.items() if "size" in name or "num" in name}
    model = CLIPModel(CLIPConfig(vision_config=CLIP, text_config=text))
    _randomized(model.vision_model)
    return model


def make_siglip_vision() -> torch.nn.Module:
    return _randomized(SiglipVisionModel(SiglipVisionConfig(**CLIP | {"image_size": 47})))


def make_siglip() -> torch.nn.Module:
    text = {name: value for name, value in CLIP.items() if "size" in name or "num" in name}
    model = SiglipModel(SiglipConfig(vision_config=CLIP, text_config=text | {"projection_size": 20}))
    _randomized(model.vision_model)
    return model


def make_internvit() -> torch.nn.Module:
    return _randomized(InternVLVisionModel(InternVLVisionConfig(**INTERNVIT, attention_bias=True)))


def make_internvit_qk_norm() -> torch.nn.Module:
    config = InternVLVisionConfig(**INTERNVIT, norm_type="rms_norm", use_qk_norm=True)
    return _randomized(InternVLVisionModel(config))


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    randomize(model)
    return model


FOLDERS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: make_llama().model,
    "llama_tied": lambda: make_llama_tied().model,
    "llama_3_1": lambda: make_llama_3_1().model,
    "mistral": make_mistral,
    "qwen2": lambda: make_qwen2().model,
    "qwen2_tied": lambda: make_qwen2_tied().model,
    "clip_vision": make_clip_vision,
    "clip": make_clip,
    "siglip_vision": make_siglip_vision,
    "siglip": make_siglip,
    "internvit": make_internvit,
    "internvit_qk_norm": make_internvit_qk_norm,
    "internvl": lambda: make_internvl().model,
    "internvl_tied": lambda: make_internvl_tied().model,
    "llava": lambda: make_llava().model,
    "llava_siglip": lambda: make_llava_siglip().model,
}
BOTH_TOWERS = {"clip", "siglip"}
"""Those of which the vision tower alone is taken."""


def save(family: str, folder: Path, **options: Any) -> torch.nn.Module:
    """Save a model of a family; return it."""
    model = FOLDERS[family]()
    model.save_pretrained(folder, **options)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def as_published(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put back into the names what published folders have there and the installed transformers leaves out."""
    before, after = {
        "clip_vision": ("", "vision_model."),
        "siglip_vision": ("", "vision_model."),
        "llava": ("vision_tower.", "vision_tower.vision_model."),
        "llava_siglip": ("vision_tower.", "vision_tower.vision_model."),
    }.get(family, ("", ""))
    return {
        after + name.removeprefix(before) if name.startswith(before) else name: tensor
        for name, tensor in tensors.items()
    }


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit by bit, and of the same type."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values of config.json; ``a__b`` is ``b`` inside ``a``."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, inner = name.split("__")
        inside = tree
        for step in outer:
            inside = inside[step]
        inside[inner] = value
    path.write_text(json.dumps(tree))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
