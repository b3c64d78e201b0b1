"""EVA's ViT against Blip2VisionModel; stretched positions of every kind; BLIP-2's parameter count."""

from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

from megavlm.convert.rules import GroupedQKV
from megavlm.convert.vision_config import vision_config
from megavlm.models.backend import BACKENDS
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vision.eva import EvaConfig
from megavlm.models.vision.single import SINGLE_ENCODERS
from megavlm.models.vision.transformer import VisionTransformer
from megavlm.runtime import process
from megavlm.runtime.fake_world import fake_world

SETTINGS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
}
SHAPE: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 7,
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 3,
}
NEEDED: dict[str, dict[str, Any]] = {
    "internvit": {"normalization": "RMSNorm", "qk_layernorm": True, "add_qkv_bias": False}
}
NAMES = {  # theirs -> ours, of a layer
    "layer_norm1.": "input_layernorm.",
    "self_attn.projection.": "self_attention.linear_proj.",
    "layer_norm2.": "pre_mlp_layernorm.",
    "mlp.fc1.": "mlp.linear_fc1.",
    "mlp.fc2.": "mlp.linear_fc2.",
}


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def blip2(image_size: int) -> Blip2VisionModel:
    torch.manual_seed(4)
    theirs = Blip2VisionModel(
        Blip2VisionConfig(
            image_size=image_size,
            patch_size=7,
            num_hidden_layers=3,
            hidden_size=24,
            intermediate_size=40,
            num_attention_heads=3,
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


def as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of theirs, by our names and in our shapes."""
    qkv, found = GroupedQKV(3, 3), {}
    for name, tensor in tensors.items():
        if name.startswith("encoder.layers."):
            number, inside = name.removeprefix("encoder.layers.").split(".", 1)
            ours = f"encoder.layers.{number}."
            if inside.startswith("self_attn.qkv."):
                tensor = qkv.merge(list(tensor.chunk(3)))
                inside = inside.replace("self_attn.qkv.", "self_attention.linear_qkv.")
            for their_part, our_part in NAMES.items():
                inside = inside.replace(their_part, our_part)
            found[ours + inside] = tensor
        elif name == "embeddings.class_embedding":
            found["embedding.class_token"] = tensor.flatten()
        elif name == "embeddings.position_embedding":
            found["embedding.positions"] = tensor[0]
        else:
            found[name.replace("embeddings.patch_embedding.", "embedding.")] = tensor
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / max(0.1, float(expected.detach().abs().max())))


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(("image_size", "pretrained"), [(28, None), (42, 28), (21, 35)])
def test_computes_as_blip2(image_size: int, pretrained: int | None) -> None:
    theirs = blip2(pretrained or image_size)
    config = EvaConfig(**{**SHAPE, "image_size": image_size}, pretrained_image_size=pretrained, keep_class_token=True)
    ours = config.build(SETTINGS, BACKENDS["torch"])
    own = dict(ours.named_parameters())
    given = as_ours(dict(theirs.named_parameters()))
    assert own.keys() == given.keys()
    with torch.no_grad():
        for name, weight in given.items():
            own[name].copy_(weight)
    tiles = torch.randn(2, 3, image_size, image_size)
    found = ours(tiles)
    expected = theirs(tiles, interpolate_pos_encoding=pretrained is not None).last_hidden_state
    upstream = torch.randn_like(expected)
    found.backward(upstream)
    expected.backward(upstream)
    gradients = as_ours({name: weight.grad for name, weight in theirs.named_parameters()})
    differences = {"output": difference(found, expected)}
    differences |= {name: difference(own[name].grad, gradient) for name, gradient in gradients.items()}
    # Worst seen: 8.8e-7.
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.usefixtures("_one_rank")
def test_keys_have_no_bias_to_speak_of() -> None:
    """EVA has none on keys: it changes no output."""
    ours = EvaConfig(**SHAPE).build(SETTINGS, BACKENDS["torch"])
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tiles = torch.randn(2, 3, 28, 28)
    before = ours(tiles)
    for layer in ours.encoder.layers:
        # each head's query, key and value of 8 channels stand together
        layer.self_attention.linear_qkv.bias.data.view(3, 3, 8)[:, 1] += 5.0
    # Worst seen: 3.6e-7 of values up to 1.7.
    torch.testing.assert_close(ours(tiles), before, rtol=1e-4, atol=2e-5)


def test_blip2_has_a_billion_parameters() -> None:
    config = EvaConfig(
        image_size=224,
        patch_size=14,
        num_layers=40,
        select_layer=-2,
        hidden_size=1408,
        ffn_hidden_size=6144,
        num_attention_heads=16,
    )
    layer = 4 * 1408**2 + 4 * 1408 + 2 * 1408 * 6144 + 6144 + 1408 + 4 * 1408
    with fake_world(world_size=1, rank=0):
        parallel_state.initialize_model_parallel()
        count = sum(parameter.numel() for parameter in config.build(SETTINGS, BACKENDS["torch"]).parameters())
    assert count == 39 * layer + (3 * 14**2 + 1) * 1408 + 1408 + 257 * 1408 + 2 * 1408
    assert round(count / 1e6) == 986
    assert config.num_patches == 256


def read(kind: str, **fields: Any) -> Any:
    adapter = pydantic.TypeAdapter(AnyVisionConfig)
    return adapter.validate_python({"kind": kind, **SHAPE, **NEEDED.get(kind, {}), **fields})


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_positions_of_every_kind_are_stretched(kind: str) -> None:
    def build(config: Any) -> VisionTransformer:
        encoder = config.build(SETTINGS, BACKENDS["torch"])
        torch.manual_seed(6)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return encoder

    config = read(kind, image_size=42, pretrained_image_size=28)
    stretching, direct = build(config), build(read(kind, image_size=42))
    first = int(config.has_class_token)
    assert stretching.embedding.positions.shape[0] == 16 + first
    assert direct.embedding.positions.shape[0] == 36 + first
    grid = stretching.embedding.positions[first:].detach().T.view(1, 24, 4, 4)
    stretched = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    with torch.no_grad():
        others = dict(stretching.named_parameters())
        for name, parameter in direct.named_parameters():
            if name == "embedding.positions":
                parameter[first:].copy_(stretched[0].flatten(1).T)
                parameter[:first].copy_(others[name][:first])
            else:
                parameter.copy_(others[name])
    tiles = torch.randn(2, 3, 42, 42)
    assert stretching(tiles).shape == (2, config.num_patches, 24)
    torch.testing.assert_close(stretching(tiles), direct(tiles), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SINGLE_ENCODERS if kind != "siglip"])
def test_pretrained_size_that_is_no_grid_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"pretrained_image_size=30: is not a multiple of patch_size=7"):
        read(kind, pretrained_image_size=30)


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_pretrained_size_below_a_patch_is_named(kind: str) -> None:
    message = r"pretrained_image_size=5: is (smaller than|not a multiple of) patch_size=7"
    with pytest.raises(ValueError, match=message):
        read(kind, pretrained_image_size=5)


def test_what_transformers_cannot_say_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"pretrained_image_size=14: its positions are stretched to image_size=28"):
        vision_config(read("clip", pretrained_image_size=14))
    with pytest.raises(ValueError, match=r"model\.vision\.kind='eva': is not written for transformers"):
        vision_config(read("eva"))
