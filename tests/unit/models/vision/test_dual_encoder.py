"""Several encoders for one tile: the mean of their features, or all of them; fresh weights; refusals."""

from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
import torch
from megatron.core import parallel_state
from tiny_vlm import TINY

from megavlm.models.backend import BACKENDS
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.products import product_sides
from megavlm.models.vision import VISION_ENCODERS, AnyVisionConfig
from megavlm.models.vision.dual import DualConfig, DualEncoder
from megavlm.models.vision.single import SINGLE_ENCODERS
from megavlm.runtime import process

SETTINGS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
}
CLIP: dict[str, Any] = {
    "kind": "clip",
    "image_size": 28,
    "patch_size": 7,
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
}
SIGLIP = {**CLIP, "kind": "siglip", "num_layers": 1, "init_method_std": 0.3}


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def config_of(*encoders: dict[str, Any], **fields: Any) -> DualConfig:
    return pydantic.TypeAdapter(AnyVisionConfig).validate_python({"kind": "dual", "encoders": encoders, **fields})


def build(config: DualConfig) -> DualEncoder:
    encoder = config.build(SETTINGS, BACKENDS["torch"])
    holder = torch.nn.Module()
    holder.vision = encoder
    holder.sharded_state_dict = lambda metadata: encoder.sharded_state_dict(prefix="vision.", metadata=metadata)
    initialize_weights([holder], seed=3)
    return encoder


def test_every_kind_but_itself_can_be_put_together() -> None:
    assert VISION_ENCODERS.keys() - SINGLE_ENCODERS.keys() == {"dual"}


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(("weights", "used"), [(None, (0.5, 0.5)), ([0.2, 0.8], (0.2, 0.8)), ([1.0, 0.0], (1.0, 0.0))])
def test_average_is_weighted(weights: list[float] | None, used: tuple[float, float]) -> None:
    encoder = build(config_of(CLIP, SIGLIP, weights=weights))
    tiles = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    first, second = (one(tiles) for one in encoder.encoders)
    assert not torch.allclose(first, second, atol=0.1)
    found = encoder(tiles)
    assert found.shape == (3, 16, 16)
    assert torch.allclose(found, used[0] * first + used[1] * second, atol=1e-6)


@pytest.mark.usefixtures("_one_rank")
def test_concatenation_keeps_all() -> None:
    wide = {**SIGLIP, "hidden_size": 24, "num_attention_heads": 3}
    with pytest.raises(ValueError, match=r"hidden_size is 16 and 24, and must be the same to be averaged"):
        config_of(CLIP, wide)
    config = config_of(CLIP, wide, combine="concatenate")
    encoder = build(config)
    tiles = torch.rand(2, 3, 28, 28)
    assert encoder(tiles).shape == (2, config.num_patches, config.hidden_size) == (2, 16, 40)
    assert torch.equal(encoder(tiles)[..., 16:], encoder.encoders[1](tiles))


@pytest.mark.usefixtures("_one_rank")
def test_each_encoder_is_drawn_by_its_own_numbers() -> None:
    encoder = build(config_of(CLIP, {**SIGLIP, "num_layers": 8}))
    stds = [float(one.embedding.weight.std()) for one in encoder.encoders]
    # 2352 normal numbers: within 7 % of 0.02 and 0.3
    assert stds == [pytest.approx(0.02, rel=0.07), pytest.approx(0.3, rel=0.07)]
    # a writer to the residual stream has 1 / sqrt(2 * layers) of it; 256 numbers
    writers = [float(one.encoder.layers[0].self_attention.linear_proj.weight.std()) for one in encoder.encoders]
    assert writers == [pytest.approx(0.02 / 2, rel=0.2), pytest.approx(0.3 / 4, rel=0.2)]
    keys = encoder.sharded_state_dict("vision.", metadata=None)
    assert {key.split(".")[2] for key in keys} == {"0", "1"}


def test_every_encoder_has_sides_of_products() -> None:
    connector = {"kind": "linear"}
    model = VLMConfig.model_validate({**TINY, "vision": config_of(CLIP, SIGLIP).model_dump(), "connector": connector})
    sides = {side.size for side in product_sides(model, 1) if side.name == "vectors of a tile in model.vision"}
    assert sides == {17, 16}  # with a class token and without


@pytest.mark.parametrize(
    ("encoders", "fields", "message"),
    [
        ([CLIP], {}, r"encoders"),
        ([CLIP, {**CLIP, "image_size": 42}], {}, r"model\.vision\.encoders: their image_size is 28 and 42"),
        ([CLIP, {**CLIP, "patch_size": 14}], {}, r"model\.vision\.encoders: their num_patches is 16 and 4"),
        ([CLIP, {**CLIP, "keep_class_token": True}], {}, r"their num_patches is 16 and 17, and must be the same"),
        ([CLIP, CLIP], {"weights": [0.5, 0.4]}, r"must be 2 numbers.* these have the sum 0\.9"),
        ([CLIP, CLIP], {"weights": [1.0]}, r"must be 2 numbers"),
        ([CLIP, CLIP], {"weights": [0.5, 0.5], "combine": "concatenate"}, r"combine='concatenate' has no mean"),
        ([CLIP, {"kind": "dual", "encoders": [CLIP, CLIP]}], {}, r"dual"),
    ],
)
def test_encoders_that_do_not_fit_are_named(
    encoders: list[dict[str, Any]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(*encoders, **fields)


def test_layout_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"ffn_hidden_size=36: is not a multiple of tensor_model_parallel_size=8"):
        config_of(CLIP, {**SIGLIP, "ffn_hidden_size": 36}).check_layout(8)
