"""What every vision encoder must do, and what each kind has of its own. Parity with others: tests/unit/convert."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megavlm.config import validate
from megavlm.models.backend import BACKENDS, attention_spec
from megavlm.models.first_stage import first_stage_config
from megavlm.models.initialization import initialize_weights
from megavlm.models.vision import clip as clip_module
from megavlm.models.vision.clip import ClipConfig, quick_gelu
from megavlm.models.vision.internvit import FullWidthRMSNorm, InternViTConfig
from megavlm.models.vision.single import SINGLE_ENCODERS
from megavlm.models.vision.transformer import VisionTransformer
from megavlm.runtime import process
from megavlm.runtime.sharding import sharding_metadata

SHAPE: dict[str, Any] = {
    "image_size": 56,
    "patch_size": 14,
    "num_layers": 2,
    "hidden_size": 80,
    "ffn_hidden_size": 160,
    "num_attention_heads": 5,
}
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "clip": {},
    "dinov2": {"post_layernorm": False},
    "eva": {"post_layernorm": False},
    "internvit": {"normalization": "RMSNorm", "qk_layernorm": True, "add_qkv_bias": False},
    "siglip": {"post_layernorm": False},
}
SETTINGS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
}


def make_config(kind: str, **changes: Any) -> Any:
    return SINGLE_ENCODERS[kind](kind=kind, **{**SHAPE, **OWN_FIELDS[kind], **changes})


class Model(torch.nn.Module):
    """An encoder where a whole model has it, so that it can be filled with weights."""

    def __init__(self, vision: VisionTransformer) -> None:
        super().__init__()
        self.vision = vision

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return self.vision.sharded_state_dict(prefix="vision.", metadata=metadata)


def build(config: Any, seed: int = 3, **settings: Any) -> VisionTransformer:
    encoder = config.build({**SETTINGS, **settings}, BACKENDS["torch"])
    initialize_weights([Model(encoder)], seed)
    return encoder


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def pixels(num_tiles: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (num_tiles, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_gives_the_shape_that_the_config_states(kind: str) -> None:
    config = make_config(kind)
    features = build(config)(pixels(3))
    assert features.shape == (3, config.num_patches, config.hidden_size)
    assert config.num_patches == 16


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_bytes_are_normalised_by_the_kinds_mean_and_std(kind: str) -> None:
    config = make_config(kind, image_std=(0.3, 0.25, 0.2))  # SigLIP's own is its mean
    encoder = build(config)
    tiles = pixels()
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (config.image_mean, config.image_std)
    )
    normalised = ((tiles.double() / 255 - mean) / std).float()
    assert config.image_mean == make_config(kind).image_mean != config.image_std
    # Worst seen: 9e-7.
    torch.testing.assert_close(encoder(tiles), encoder(normalised), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_patches_are_those_of_the_convolution(kind: str) -> None:
    config = make_config(kind)
    embedding, first = build(config).embedding, int(config.has_class_token)
    tiles = torch.randn(2, 3, 56, 56)
    convolved = torch.nn.functional.conv2d(tiles, embedding.weight, embedding.bias, stride=14)
    expected = convolved.flatten(2).permute(2, 0, 1) + embedding.positions[first:, None]
    # Worst seen: 1.6e-6.
    torch.testing.assert_close(embedding(tiles)[first:], expected, rtol=1e-5, atol=5e-6)
    if config.has_class_token:
        torch.testing.assert_close(embedding(tiles)[0, 1], embedding.class_token + embedding.positions[0])


def influence_of_last_patch_on_first(encoder: VisionTransformer) -> float:
    tiles = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    changed = tiles.clone()
    changed[..., 42:, 42:] += 1.0
    with torch.no_grad():
        return float((encoder(changed)[0, 0] - encoder(tiles)[0, 0]).abs().max())


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_attention_sees_both_ways(kind: str) -> None:
    assert influence_of_last_patch_on_first(build(make_config(kind))) > 1e-4


def test_causal_attention_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(backend: Any, attn_mask_type: AttnMaskType, **options: Any) -> Any:
        return attention_spec(backend, AttnMaskType.causal, **options)

    monkeypatch.setattr(clip_module, "attention_spec", causal)
    assert influence_of_last_patch_on_first(build(make_config("clip"))) == 0.0


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_select_layer_is_the_output_of_that_layer(kind: str) -> None:
    whole = build(make_config(kind))
    shorter = build(make_config(kind, select_layer=-2))
    assert len(shorter.encoder.layers) == 1
    inputs = torch.randn(1, 3, 56, 56)
    outputs = []
    whole.encoder.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    shorter.load_state_dict(whole.state_dict(), strict=False)
    whole(inputs)
    assert torch.equal(shorter(inputs), outputs[0][int(make_config(kind).has_class_token) :].transpose(0, 1))


@pytest.mark.parametrize("kind", [kind for kind, config in SINGLE_ENCODERS.items() if config.has_class_token])
def test_class_token_can_be_kept(kind: str) -> None:
    config = make_config(kind, keep_class_token=True)
    features = build(config)(pixels())
    assert features.shape[1] == config.num_patches == 17
    assert torch.equal(features[:, 1:], build(make_config(kind))(pixels()))


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_bfloat16_stays_near_float32(kind: str) -> None:
    precise = build(make_config(kind))
    rough = build(make_config(kind), params_dtype=torch.bfloat16, bf16=True, pipeline_dtype=torch.bfloat16)
    expected = precise(pixels()).detach()
    found = rough(pixels()).detach()
    assert found.dtype == torch.bfloat16
    # Worst seen: 0.8 % of the largest feature.
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 0.03


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
@pytest.mark.parametrize(
    ("settings"),
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ],
    ids=["full", "core_attn"],
)
def test_recompute_gives_the_same_gradients(kind: str, settings: dict[str, Any]) -> None:
    model_parallel_cuda_manual_seed(1)
    gradients = []
    for chosen in ({}, settings):
        encoder = build(make_config(kind), **chosen)
        encoder(pixels()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        # Worst seen: 6e-7 of the largest (attention's backward sums in another order where its inputs lie elsewhere).
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0.0, atol=1e-5 * float(gradient.abs().max()))


def test_the_stage_layout_of_the_language_model_does_not_reach_the_encoder() -> None:
    config = first_stage_config(
        {
            **SETTINGS,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 4,
            "virtual_pipeline_model_parallel_size": 2,
            "pipeline_dtype": torch.float32,
            "sequence_parallel": True,
            "context_parallel_size": 2,
            "bias_activation_fusion": True,
        },
        num_layers=3,
        hidden_size=8,
        num_attention_heads=2,
    )
    assert (config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size) == (1, None)
    assert (config.tensor_model_parallel_size, config.context_parallel_size) == (2, 1)
    assert not config.sequence_parallel
    assert not config.bias_activation_fusion
    assert config.hidden_dropout == config.attention_dropout == 0.0


def test_quick_gelu_is_the_published_formula() -> None:
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x), rtol=1e-14, atol=1e-16)


def test_full_width_norm_counts_the_real_width() -> None:
    config = first_stage_config(SETTINGS, num_layers=1, hidden_size=12, num_attention_heads=4, kv_channels=4)
    norm = FullWidthRMSNorm(hidden_size=4, config=config, eps=1e-6, full_width=12)
    states = torch.randn(5, 2, 4, 4)
    states[:, :, 3] = 0.0  # the dummy head
    real = states[:, :, :3].flatten(2)
    expected = torch.nn.functional.rms_norm(real, (12,), eps=1e-6)
    torch.testing.assert_close(norm(states)[:, :, :3].flatten(2), expected)
    assert not norm(states)[:, :, 3].any()


ERRORS = [
    ({"patch_size": 15}, r"model\.vision\.image_size=56: is not a multiple of patch_size=15\. Change one of them"),
    ({"num_attention_heads": 3}, r"model\.vision\.hidden_size=80: is not a multiple of num_attention_heads=3"),
    ({"select_layer": -3}, r"model\.vision\.select_layer=-3: the encoder has num_layers=2\. Choose -1 to -2"),
    ({"select_layer": 0}, r"select_layer=0: Input should be less than 0"),
]


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_wrong_numbers_are_named(kind: str, changes: dict[str, Any], message: str) -> None:
    if "patch_size" in changes and SINGLE_ENCODERS[kind].cuts_tiles:
        return  # there it is right: see test_siglip.py
    with pytest.raises(ValueError, match=message):
        validate({"kind": kind, **SHAPE, **OWN_FIELDS[kind], **changes}, SINGLE_ENCODERS[kind], source="test")


def test_a_width_that_does_not_divide_is_named() -> None:
    config = make_config("clip", ffn_hidden_size=162)
    message = r"model\.vision\.ffn_hidden_size=162: is not a multiple of tensor_model_parallel_size=4\. Choose"
    with pytest.raises(ValueError, match=message):
        config.check_layout(4)
    with pytest.raises(ValueError, match=message):
        config.build({**SETTINGS, "tensor_model_parallel_size": 4}, BACKENDS["torch"])
    make_config("clip").check_layout(4)  # 5 heads are no obstacle


def test_tiles_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tiles\.shape=\(1, 3, 28, 28\): the encoder takes \[T, 3, 56, 56\]\. Set"):
        build(make_config("clip"))(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def save_and_load(kind: str, folder: str, tp: int, *, is_saving: bool) -> tuple[Tensor, int]:
    """On ranks: save an encoder, or load it into one that has other weights. Returns features and heads."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    config: ClipConfig | InternViTConfig = make_config(kind)
    encoder = build(config, seed=3 if is_saving else 4, tensor_model_parallel_size=tp)
    sharded = Model(encoder).sharded_state_dict(sharding_metadata())
    if is_saving:
        dist_checkpointing.save(sharded, folder)
    else:
        dummies = {
            name: parameter.unpadded_shape for name, parameter in encoder.named_parameters() if is_padded(parameter)
        }
        assert bool(dummies) == (tp > 1)
        loaded = dist_checkpointing.load(sharded, folder)
        encoder.load_state_dict({name.removeprefix("vision."): value for name, value in loaded.items()})
    with torch.no_grad():
        return encoder(pixels()), encoder.config.num_attention_heads


def is_padded(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "unpadded_shape")


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 4), (4, 1), (2, 4)])
def test_checkpoint_loads_with_another_number_of_dummy_heads(
    kind: str, saved_at: int, loaded_at: int, tmp_path: Any
) -> None:
    saved = run_ranks(_save, saved_at, kind, str(tmp_path), saved_at)
    loaded = run_ranks(_load, loaded_at, kind, str(tmp_path), loaded_at)
    heads = {1: 5, 2: 6, 4: 8}
    assert (saved[0][1], loaded[0][1]) == (heads[saved_at], heads[loaded_at])
    # Worst seen: 1.2e-6 (sums in another order).
    torch.testing.assert_close(loaded[0][0], saved[0][0], rtol=1e-5, atol=1e-5)


def _save(kind: str, folder: str, tp: int) -> tuple[Tensor, int]:
    return save_and_load(kind, folder, tp, is_saving=True)


def _load(kind: str, folder: str, tp: int) -> tuple[Tensor, int]:
    return save_and_load(kind, folder, tp, is_saving=False)


def train_with_dummies(kind: str, tp: int) -> tuple[float, float]:
    """On ranks: three AdamW steps with weight decay. Returns the largest dummy weight, and how far real ones moved."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    encoder = build(make_config(kind), tensor_model_parallel_size=tp)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        encoder(pixels()).square().sum().backward()
        optimizer.step()
    largest, moved = 0.0, 0.0
    for shard in Model(encoder).sharded_state_dict(sharding_metadata()).values():
        if not is_padded(getattr(shard, "data", None)):
            continue
        full = torch.zeros(shard.global_shape)
        window = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
        full[window] = shard.data.detach()
        full[tuple(slice(0, n) for n in shard.data.unpadded_shape)] = 0.0
        largest = max(largest, float(full.abs().max()))
    for name, parameter in encoder.named_parameters():
        moved = max(moved, float((parameter.detach() - before[name]).abs().max()))
    return largest, moved


@pytest.mark.parametrize("kind", SINGLE_ENCODERS)
def test_dummy_heads_stay_zero_in_training(kind: str) -> None:
    for largest, moved in run_ranks(train_with_dummies, 4, kind, 4):
        assert largest == 0.0
        assert moved > 1e-3
