"""What DINOv2 has of its own: two image sizes, positions stretched from one to the other, SwiGLU, a norm at the end."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from test_encoder_sizes import SETTINGS as META_SETTINGS
from torch import Tensor
from transformers import Dinov2Config as PublishedConfig
from transformers import Dinov2Model

from megavlm.config import validate
from megavlm.models.backend import BACKENDS
from megavlm.models.vision.dinov2 import Dinov2Config
from megavlm.models.vision.tile_embedding import TileEmbedding
from megavlm.runtime import process
from megavlm.runtime.fake_world import fake_world

SHAPE: dict[str, Any] = {
    "patch_size": 14,
    "num_layers": 1,
    "hidden_size": 24,
    "ffn_hidden_size": 32,
    "num_attention_heads": 3,
}
# Layers, width, feed-forward width, heads, SwiGLU, and the millions of parameters that arXiv 2304.07193 gives.
PUBLISHED = {
    "small": (12, 384, 1536, 6, False, 22),
    "base": (12, 768, 3072, 12, False, 87),
    "large": (24, 1024, 4096, 16, False, 304),
    "giant": (40, 1536, 4096, 24, True, 1136),
}


def config_of(**fields: Any) -> Dinov2Config:
    return validate({"kind": "dinov2", **SHAPE, **fields}, Dinov2Config, source="test")


def embedding(image_size: int, position_side: int, dtype: torch.dtype = torch.float32) -> TileEmbedding:
    """An embedding that shows its positions alone: everything else is zero."""
    made = TileEmbedding(
        image_size=image_size,
        patch_size=14,
        hidden_size=2,
        has_bias=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        dtype=dtype,
        position_side=position_side,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    return made


def shown(made: TileEmbedding) -> Tensor:
    size = made.image_size
    return made(torch.zeros(1, 3, size, size))[1:, 0].unflatten(0, (size // 14, size // 14)).detach()


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"image_size": 56}, (56, 56)),
        ({"pretrained_image_size": 70}, (70, 70)),
        ({"image_size": 56, "pretrained_image_size": 70}, (56, 70)),
    ],
)
def test_one_image_size_stands_for_both(fields: dict[str, int], sizes: tuple[int, int]) -> None:
    config = config_of(**fields)
    assert (config.image_size, config.pretrained_image_size) == sizes
    assert config.num_patches == (sizes[0] // 14) ** 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"image_size: Field required|image_size: .*required"),
        (
            {"image_size": 56, "pretrained_image_size": 60},
            r"pretrained_image_size=60: is not a multiple of patch_size=14",
        ),
        ({"image_size": 56, "pretrained_image_size": 0}, r"pretrained_image_size=0: Input should be greater than 0"),
    ],
)
def test_wrong_sizes_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**fields)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(("image_size", "position_side"), [(112, 37), (70, 3), (42, 5)])
def test_a_ramp_of_positions_stays_a_ramp(image_size: int, position_side: int) -> None:
    """Away from the border, bicubic interpolation keeps a plane up to 5 % of a step: no row or column is displaced."""
    made = embedding(image_size, position_side)
    axis = torch.arange(position_side, dtype=torch.float32)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    with torch.no_grad():
        made.positions[1:] = torch.stack((rows, 10 * columns), -1).flatten(0, 1)
        made.positions[0] = 99.0  # the class token's takes no part
    side = image_size // 14
    centres = (torch.arange(side) + 0.5) * position_side / side - 0.5
    inner = (centres >= 1) & (centres <= position_side - 2)
    assert inner.any()
    found = shown(made)[inner][:, inner]
    expected = torch.stack(torch.meshgrid(centres[inner], 10 * centres[inner], indexing="ij"), -1)
    # Worst seen: 0.048 of a step (cubic convolution with a = -0.75 is not exact on planes).
    assert float(((found - expected) / torch.tensor([1.0, 10.0])).abs().max()) < 0.08


@pytest.mark.usefixtures("_one_rank")
def test_a_grid_of_the_tiles_size_is_taken_as_it_is() -> None:
    made = embedding(56, 4)
    torch.nn.init.normal_(made.positions)
    assert torch.equal(shown(made).flatten(0, 1), made.positions[1:])


@pytest.mark.usefixtures("_one_rank")
def test_bfloat16_positions_are_stretched_in_float32() -> None:
    precise, rough = embedding(112, 37), embedding(112, 37, torch.bfloat16)
    with torch.no_grad():
        rough.positions.normal_(generator=torch.Generator().manual_seed(0))
        precise.positions.copy_(rough.positions)
    assert torch.equal(shown(rough), shown(precise).bfloat16())


@pytest.mark.usefixtures("_one_rank")
def test_gradients_reach_the_positions_as_they_were_learned() -> None:
    made = embedding(28, 5)
    made(torch.zeros(1, 3, 28, 28)).sum().backward()
    assert made.positions.grad is not None
    assert made.positions.grad.shape == (26, 2)
    # Each of the four stretched positions and the class token's are sums with weights that add up to 1.
    torch.testing.assert_close(made.positions.grad.sum(0), torch.full((2,), 5.0))


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("post_layernorm", [True, False])
def test_the_norm_at_the_end_is_a_setting(post_layernorm: bool) -> None:
    settings = {"params_dtype": torch.float32, "perform_initialization": False, "gradient_accumulation_fusion": False}
    encoder = config_of(image_size=28, post_layernorm=post_layernorm).build(settings, BACKENDS["torch"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if encoder.post_layernorm is not None:
            encoder.post_layernorm.weight.fill_(1.0)
            encoder.post_layernorm.bias.fill_(0.0)
        features = encoder(torch.randn(2, 3, 28, 28, generator=generator))
    is_normed = bool(features.mean(-1).abs().max() < 1e-5 and (features.var(-1, correction=0) - 1).abs().max() < 1e-3)
    assert is_normed == post_layernorm


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_as_many_as_published(size: str) -> None:
    num_layers, width, ffn_width, heads, is_gated, millions = PUBLISHED[size]
    config = Dinov2Config(
        pretrained_image_size=518,
        image_size=224,
        patch_size=14,
        num_layers=num_layers,
        hidden_size=width,
        ffn_hidden_size=ffn_width,
        num_attention_heads=heads,
        gated_linear_unit=is_gated,
    )
    assert config.num_ffn_inputs == 1 + is_gated
    with fake_world(world_size=1, rank=0):
        parallel_state.initialize_model_parallel()
        encoder = config.build({**META_SETTINGS, "perform_initialization": False}, BACKENDS["torch"])
        found = sum(parameter.numel() for parameter in encoder.parameters())
    theirs = PublishedConfig(
        image_size=518,
        num_hidden_layers=num_layers,
        hidden_size=width,
        num_attention_heads=heads,
        use_swiglu_ffn=is_gated,
        use_mask_token=False,  # of pretraining
    )
    with torch.device("meta"):
        assert found == sum(parameter.numel() for parameter in Dinov2Model(theirs).parameters())
    assert round(found / 1e6) == millions
