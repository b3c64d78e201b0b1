"""The MLP connector: token order, its four published settings, tensor parallelism, sizes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core import parallel_state
from torch import Tensor, nn

from megavlm.models.backend import BACKENDS
from megavlm.models.connectors.mlp import MLPConnector, MLPConnectorConfig, pixel_shuffle
from megavlm.models.weights import fill_weights
from megavlm.runtime import fake_world

SETTINGS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
}
WIDTH, HIDDEN = 8, 24

PUBLISHED: dict[str, dict[str, Any]] = {
    "nvlm_d": {"ffn_hidden_size": 40},
    "nvlm_x": {"num_layers": 1},
    "internvl": {"bias": True},
    "llava_1_5": {"bias": True, "pixel_shuffle_ratio": 1, "layernorm": False},
}


class Model(torch.nn.Module):
    """A connector where a whole model has it, so that it can be filled with weights."""

    def __init__(self, connector: MLPConnector) -> None:
        super().__init__()
        self.connector = connector

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return self.connector.sharded_state_dict(prefix="connector.", metadata=metadata)


def reference(config: MLPConnectorConfig) -> nn.Sequential:
    """The same connector in plain torch, after the shuffle."""
    width = WIDTH * 4 if config.pixel_shuffle_ratio == 0.5 else WIDTH
    layers: list[nn.Module] = [nn.LayerNorm(width, eps=config.layernorm_epsilon)] if config.layernorm else []
    if config.num_layers == 1:
        return nn.Sequential(*layers, nn.Linear(width, HIDDEN, bias=config.bias))
    inner = config.ffn_hidden_size or HIDDEN
    first, last = nn.Linear(width, inner, bias=config.bias), nn.Linear(inner, HIDDEN, bias=config.bias)
    return nn.Sequential(*layers, first, nn.GELU(), last)


def torch_shuffle(features: Tensor) -> Tensor:
    """Torch's own pixel unshuffle, whose channels are ordered [width, block], put in the order [block, width]."""
    tiles, patches, width = features.shape
    side = round(patches**0.5)
    image = features.transpose(1, 2).reshape(tiles, width, side, side)
    folded = nn.functional.pixel_unshuffle(image, 2).unflatten(1, (width, 4)).transpose(1, 2)
    return folded.flatten(1, 2).flatten(2).transpose(1, 2)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected.detach()).abs().max() / expected.detach().abs().max())


def project(tp: int, config: MLPConnectorConfig, weights: list[Tensor], features: Tensor, upstream: Tensor) -> Any:
    """On ranks: fill, run forward and backward. Returns tokens, input gradient and each weight's gradient shard."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    connector = config.build(WIDTH, HIDDEN, {**SETTINGS, "tensor_model_parallel_size": tp}, BACKENDS["torch"])
    names = [name for name, _ in connector.named_parameters()]
    given = {f"connector.{name}": weight for name, weight in zip(names, weights, strict=True)}
    fill_weights([Model(connector)], lambda slot: given[slot.key])
    inputs = features.clone().requires_grad_()
    tokens = connector(inputs)
    tokens.backward(upstream)
    return tokens.detach(), inputs.grad, [parameter.grad for parameter in connector.parameters()]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_plain_torch(name: str, tp: int) -> None:
    config = MLPConnectorConfig(**PUBLISHED[name])
    torch.manual_seed(2)
    expected_module = reference(config)
    for parameter in expected_module.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(3, 16, WIDTH, requires_grad=True)
    shuffled = torch_shuffle(features) if config.pixel_shuffle_ratio == 0.5 else features
    expected = expected_module(shuffled)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    weights = [parameter.detach() for parameter in expected_module.parameters()]
    assert expected.shape[1] == config.tokens_per_tile(16)

    answers = run_ranks(project, tp, tp, config, weights, features.detach(), upstream)

    for rank, (tokens, input_gradient, weight_gradients) in enumerate(answers):
        # Worst seen: 4.4e-7.
        differences = [relative_difference(tokens, expected), relative_difference(input_gradient, features.grad)]
        for found, parameter in zip(weight_gradients, expected_module.parameters(), strict=True):
            shard = parameter.grad
            for axis in range(found.ndim):
                if found.shape[axis] != shard.shape[axis]:
                    shard = shard.chunk(tp, dim=axis)[rank]
            differences.append(relative_difference(found, shard))
        assert max(differences) < 1e-5, differences


def test_pixel_shuffle_keeps_rows_and_orders_blocks_by_place() -> None:
    # patch r, c of a 4 x 4 tile holds the number 10 * r + c, in two channels
    numbers = torch.tensor([[10 * row + column for column in range(4)] for row in range(4)])
    features = torch.stack((numbers, -numbers), dim=-1).reshape(1, 16, 2)
    tokens = pixel_shuffle(features)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, :, 0::2].tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]
    assert torch.equal(tokens[..., 1::2], -tokens[..., 0::2])


def test_pixel_shuffle_takes_features_in_any_memory_order() -> None:
    features = torch.randn(16, 3, WIDTH).transpose(0, 1)
    assert torch.equal(pixel_shuffle(features), torch_shuffle(features.contiguous()))


@pytest.mark.parametrize(
    ("ratio", "num_patches", "tokens"), [(0.5, 1024, 256), (0.5, 4, 1), (1, 576, 576), (1, 577, 577)]
)
def test_tokens_per_tile(ratio: float, num_patches: int, tokens: int) -> None:
    assert MLPConnectorConfig(pixel_shuffle_ratio=ratio).tokens_per_tile(num_patches) == tokens


@pytest.mark.parametrize("num_patches", [577, 9, 1025, 8])
def test_patches_that_do_not_fold_are_refused(num_patches: int) -> None:
    message = rf"model\.connector\.pixel_shuffle_ratio=0\.5: needs a square .* gives {num_patches} features"
    with pytest.raises(ValueError, match=message):
        MLPConnectorConfig().tokens_per_tile(num_patches)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixel_shuffle_ratio": 0.25}, r"model\.connector\.pixel_shuffle_ratio=0\.25: must be 0\.5 or 1\. Choose"),
        (
            {"num_layers": 1, "ffn_hidden_size": 9},
            r"model\.connector\.ffn_hidden_size=9: num_layers=1 has no inner width",
        ),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPConnectorConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_hidden_size": 30}, r"model\.connector: its ffn_hidden_size=30 is not a multiple of .*size=4"),
        ({"num_layers": 1}, r"model\.connector: its output size \(model\.language\.hidden_size\)=26 is not a multiple"),
    ],
)
def test_widths_that_do_not_divide_are_named(fields: dict[str, Any], message: str) -> None:
    settings = {**SETTINGS, "tensor_model_parallel_size": 4}
    with pytest.raises(ValueError, match=message):
        MLPConnectorConfig(**fields).build(WIDTH, 26, settings, BACKENDS["torch"])


@pytest.fixture
def _meta() -> Iterator[None]:
    with fake_world.fake_world(world_size=8, rank=3):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
        yield


NVLM_SIZES = [  # (fields, language model's width, millions of weights in the linear layers)
    ({"ffn_hidden_size": 29568}, 8192, 620.7),
    ({"ffn_hidden_size": 20480}, 7168, 408.9),
    ({"num_layers": 1}, 8192, 104.9),
    ({"num_layers": 1}, 7168, 91.8),
]


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize(("fields", "hidden_size", "millions"), NVLM_SIZES)
def test_nvlm_sizes(fields: dict[str, Any], hidden_size: int, millions: float) -> None:
    connector = MLPConnectorConfig(**fields).build(3200, hidden_size, SETTINGS, BACKENDS["torch"])
    parameters = list(connector.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    in_matrices = sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)
    assert round(in_matrices / 1e6, 1) == millions
    assert sum(parameter.numel() for parameter in parameters) - in_matrices == 2 * 12800  # the norm
