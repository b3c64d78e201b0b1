"""LoRA's settings, its parts, its start, and what is refused. Layouts: tests/parallel/test_lora_layouts.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from tiny_vlm import IMAGE_TOKEN_ID, TINY, VOCAB_SIZE, X, make_batch
from torch import Tensor

from megavlm.engines import MegatronEngineConfig
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.language import LanguageConfig
from megavlm.models.lora import PROJECTIONS, FusedRows, LoraConfig, LoraLinear, merge_lora
from megavlm.models.part import part_of
from megavlm.models.vlm import VLM
from megavlm.models.weights import count_parameters
from megavlm.runtime import process

LANGUAGE = TINY["language"]
MOE = {"moe": {"num_moe_experts": 4, "moe_layer_freq": 2}}


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def build(lora: dict[str, Any] | None, seed: int = 7) -> VLM:
    config = VLMConfig.model_validate({**TINY, "language": {**LANGUAGE, "lora": lora}})
    settings = MegatronEngineConfig().megatron_settings()
    model = VLM(config, settings, vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN_ID)
    initialize_weights([model], seed)
    return model


def losses(model: VLM) -> Tensor:
    with torch.no_grad():
        return model(make_batch([[2], [1, 1]], seed=3))


@pytest.mark.usefixtures("_one_rank")
def test_fresh_lora_changes_nothing() -> None:
    """The dense weights are drawn as without it, and B is zero."""
    plain, adapted = build(None), build({"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]})
    assert torch.equal(losses(plain), losses(adapted))
    own = dict(adapted.named_parameters())
    lora = {name: own.pop(name) for name in list(own) if part_of(name) == "lora"}
    assert own.keys() == dict(plain.named_parameters()).keys()
    assert len(lora) == 4 * 4 * 2
    assert all((weight == 0).all() for name, weight in lora.items() if name.endswith(".b"))
    assert all(0.07 < weight.std() < 0.13 for name, weight in lora.items() if name.endswith(".a"))  # TINY's is 0.1


@pytest.mark.usefixtures("_one_rank")
def test_parameters_are_counted_as_a_part() -> None:
    counts = count_parameters([build({"r": 5, "layers_to_transform": [0, 3]})])
    # 32 wide; 4 heads and 2 groups of 8 channels: queries 32 wide, values 16
    assert counts["lora"] == 2 * 5 * (32 + 32 + 32 + 16)
    assert counts["language"] == count_parameters([build(None)])["language"]


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("projection", [name for names in PROJECTIONS.values() for name in names])
def test_each_projection_is_moved_alone(projection: str) -> None:
    """What LoRA adds to a projection, merged into the matrix, lies where megatron-core keeps that projection."""
    model = build({"r": 2, "lora_alpha": 6, "target_modules": [projection], "layers_to_transform": [2]})
    [layer] = [name for name, names in PROJECTIONS.items() if projection in names]
    block = model.language.decoder.layers[2]
    linear = getattr(block.self_attention if layer in ("linear_qkv", "linear_proj") else block.mlp, layer)
    pair = getattr(linear.lora, projection)
    pair.b.data.normal_()
    product = (3.0 * pair.b @ pair.a).detach()
    before, expected = linear.weight.clone(), losses(model)
    assert merge_lora([model]) == 1
    moved = linear.weight - before
    rows = {
        "q_proj": [*range(16), *range(32, 48)],  # a group: two heads' queries, a key, a value; 8 rows each
        "k_proj": [*range(16, 24), *range(48, 56)],
        "v_proj": [*range(24, 32), *range(56, 64)],
        "gate_proj": [*range(64)],
        "up_proj": [*range(64, 128)],
    }.get(projection, [*range(32)])
    still = [row for row in range(len(moved)) if row not in rows]
    assert (moved[still] == 0).all()
    torch.testing.assert_close(moved[rows], product, rtol=1e-4, atol=1e-6)
    # Worst seen: 9.5e-7 of values up to 6.4.
    torch.testing.assert_close(losses(model), expected, rtol=1e-5, atol=1e-5)
    assert (pair.b == 0).all()


@pytest.mark.usefixtures("_one_rank")
def test_layers_with_cross_attention_or_experts_are_adapted_too() -> None:
    for model in (X, {**TINY, "language": {**LANGUAGE, **MOE}}):
        config = VLMConfig.model_validate({**model, "language": {**model["language"], "lora": {}}})
        settings = MegatronEngineConfig().megatron_settings()
        built = VLM(config, settings, vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN_ID)
        names = [name for name, module in built.named_modules() if isinstance(module, LoraLinear)]
        assert names == [f"language.decoder.layers.{layer}.self_attention.linear_qkv" for layer in range(4)]


def test_fused_rows_are_zero_where_nothing_is_adapted() -> None:
    rows = FusedRows(2, {"q_proj": 2, "k_proj": 1, "v_proj": 1})
    fused = rows.fuse({"q_proj": torch.tensor([[1.0, 2, 3, 4]]), "v_proj": torch.tensor([[5.0, 6]])})
    assert fused.tolist() == [[1, 2, 0, 5, 3, 4, 0, 6]]
    assert [rows.rows_of(name) for name in rows.shares] == [4, 2, 2]


def test_shared_groups_are_refused() -> None:
    settings = {**MegatronEngineConfig(tensor_model_parallel_size=4).megatron_settings()}
    config = LanguageConfig.model_validate(LANGUAGE).transformer_config(settings)
    with pytest.raises(ValueError, match=r"model\.language\.lora: num_query_groups=2 is not a multiple of .*size=4"):
        FusedRows.of("linear_qkv", config, 16)


@pytest.mark.usefixtures("_one_rank")
def test_dropout_is_of_training_alone() -> None:
    model = build({"lora_dropout": 0.5})
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_()
    model.train()
    assert not torch.equal(losses(model), losses(model))
    model.eval()
    assert torch.equal(losses(model), losses(model))


def test_defaults_are_mplug_owls() -> None:
    lora = LoraConfig()
    assert (lora.r, lora.lora_alpha, lora.scale, lora.target_modules) == (8, 32, 4.0, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("fields", "language", "message"),
    [
        ({"target_modules": ["qkv"]}, {}, r"target_modules"),
        ({"target_modules": []}, {}, r"target_modules"),
        ({"target_modules": ["q_proj", "q_proj"]}, {}, r"target_modules=.*: names q_proj twice"),
        ({"layers_to_transform": [1, 2, 1]}, {}, r"layers_to_transform=\[1, 2, 1\]: names 1 twice"),
        ({"layers_to_transform": []}, {}, r"layers_to_transform"),
        ({"layers_to_transform": [4]}, {}, r"layers_to_transform=\[4\]: names layer 4, and .*num_layers=4"),
        ({"target_modules": ["up_proj"]}, MOE, r"target_modules=\['up_proj'\]: layer 0 has experts, whose up_proj"),
        ({"r": 0}, {}, r"lora\.r\s+Input should be greater than 0"),
        ({"lora_dropout": 1.0}, {}, r"lora_dropout"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], language: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageConfig.model_validate({**LANGUAGE, **language, "lora": fields})


def test_attention_beside_experts_and_their_dense_layers_can_be_adapted() -> None:
    LanguageConfig.model_validate({**LANGUAGE, **MOE, "lora": {}})
    dense = {"target_modules": ["up_proj"], "layers_to_transform": [1, 3]}
    LanguageConfig.model_validate({**LANGUAGE, **MOE, "lora": dense})
