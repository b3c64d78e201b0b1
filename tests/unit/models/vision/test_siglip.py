"""What SigLIP has of its own: tiles that are cut, a norm at the end, no class token."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megavlm.config import validate
from megavlm.models.backend import BACKENDS
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.vision.siglip import SiglipConfig, gelu_tanh
from megavlm.models.vision.transformer import VisionTransformer
from megavlm.runtime import process
from megavlm.runtime.fake_world import fake_world

SHAPE: dict[str, Any] = {
    "kind": "siglip",
    "image_size": 45,
    "patch_size": 14,
    "num_layers": 2,
    "hidden_size": 20,
    "ffn_hidden_size": 32,
    "num_attention_heads": 5,
}
SO400M = SiglipConfig(
    image_size=384,
    patch_size=14,
    num_layers=27,
    hidden_size=1152,
    ffn_hidden_size=4304,
    num_attention_heads=16,
)
SETTINGS: dict[str, Any] = {"params_dtype": torch.float32, "gradient_accumulation_fusion": False}


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def build(config: SiglipConfig) -> VisionTransformer:
    encoder = config.build({**SETTINGS, "perform_initialization": False}, BACKENDS["torch"])
    holder = torch.nn.Module()
    holder.vision = encoder
    holder.sharded_state_dict = lambda metadata: encoder.sharded_state_dict(prefix="vision.", metadata=metadata)
    initialize_weights([holder], seed=3)
    return encoder


def test_parameters_are_as_many_as_published() -> None:
    # google/siglip-so400m-patch14-384 has 428.2 million in its vision tower, of which 15.9 are the pooling head's
    probe, attention, norm, mlp = 1152, 4 * 1152 * 1153, 2 * 1152, 2 * 4304 * 1152 + 4304 + 1152
    head = probe + attention + norm + mlp
    with fake_world(world_size=1, rank=0):
        parallel_state.initialize_model_parallel()
        settings = {**SETTINGS, "perform_initialization": False}
        count = sum(parameter.numel() for parameter in SO400M.build(settings, BACKENDS["torch"]).parameters())
    assert round((count + head) / 1e6, 1) == 428.2
    assert SO400M.num_patches == 729


def test_a_pixel_shuffle_of_its_odd_grid_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"an even side, and model\.vision gives 729 features a tile\. .*set the ratio"
    ):
        MLPConnectorConfig().tokens_per_tile(SO400M.num_patches)
    assert MLPConnectorConfig(pixel_shuffle_ratio=1.0).tokens_per_tile(SO400M.num_patches) == 729


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("as_bytes", [True, False])
def test_what_does_not_fill_a_patch_is_not_seen(as_bytes: bool) -> None:
    encoder = build(SiglipConfig(**SHAPE))
    tiles = torch.randint(0, 256, (2, 3, 45, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    changed = tiles.clone()
    changed[..., 42:, :] = changed[..., :, 42:] = 7
    features, same = (encoder(one if as_bytes else one.float()) for one in (tiles, changed))
    assert features.shape == (2, 9, 20)
    assert torch.equal(features, same)
    changed[..., 41, 41] += 100
    assert not torch.equal(features, encoder(changed if as_bytes else changed.float()))


@pytest.mark.usefixtures("_one_rank")
def test_the_norm_stands_behind_the_last_layer() -> None:
    normed, plain = build(SiglipConfig(**SHAPE)), build(SiglipConfig(**SHAPE, post_layernorm=False))
    with torch.no_grad():
        normed.post_layernorm.weight.normal_()
        normed.post_layernorm.bias.normal_()
    tiles = torch.randn(2, 3, 45, 45)
    norm = normed.post_layernorm
    expected = torch.nn.functional.layer_norm(plain(tiles), (20,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(normed(tiles), expected)
    assert plain.post_layernorm is None


def test_gelu_is_the_tanh_one() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu_tanh(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_layer": -2}, r"select_layer=-2: with post_layernorm=True features are the last layer's.*to false"),
        ({"keep_class_token": True}, r"keep_class_token=True: this kind has no class token\. Set it to false"),
        ({"image_size": 13}, r"model\.vision\.image_size=13: is smaller than patch_size=14\. Change one"),
    ],
)
def test_nonsense_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate({**SHAPE, **changes}, SiglipConfig, source="test")
