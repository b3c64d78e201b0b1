"""Every kind of connector: tokens, reachable weights, gradients, fresh weights, refusals, published sizes."""

from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from small_connectors import SMALL_CONNECTORS
from torch import Tensor

from megavlm.models.backend import BACKENDS
from megavlm.models.connectors import CONNECTORS, AnyConnectorConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.learned_positions import stretch
from megavlm.runtime import fake_world, process

SETTINGS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "perform_initialization": False,
    "gradient_accumulation_fusion": False,
}
WIDTH, HIDDEN = 32, 20
ADAPTER = pydantic.TypeAdapter(AnyConnectorConfig)


class Model(torch.nn.Module):
    """A connector where a whole model has it, so that it can be filled with weights."""

    def __init__(self, connector: torch.nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return self.connector.sharded_state_dict(prefix="connector.", metadata=metadata)


@pytest.fixture
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


@pytest.fixture
def _meta() -> Iterator[None]:
    with fake_world.fake_world(world_size=2, rank=1):
        parallel_state.initialize_model_parallel()
        yield


def read(kind: str, **fields: Any) -> Any:
    return ADAPTER.validate_python({"kind": kind, **fields})


def build(config: Any, num_patches: int, width: int = WIDTH, hidden: int = HIDDEN, **settings: Any) -> torch.nn.Module:
    return config.build(width, hidden, {**SETTINGS, **settings}, BACKENDS["torch"], num_patches=num_patches)


def test_there_is_a_small_one_of_each() -> None:
    assert SMALL_CONNECTORS.keys() == CONNECTORS.keys()
    assert all(CONNECTORS[kind].model_fields["kind"].default == kind for kind in CONNECTORS)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("num_patches", [16, 36])
def test_fresh_connector_trains_every_weight(kind: str, num_patches: int) -> None:
    config = read(kind, **SMALL_CONNECTORS[kind])
    connector = build(config, num_patches)
    initialize_weights([Model(connector)], seed=1)  # raises if a weight is out of reach
    features = torch.randn(3, num_patches, WIDTH, requires_grad=True)
    tokens = connector(features)
    assert tokens.shape == (3, config.tokens_per_tile(num_patches), HIDDEN)
    (tokens * torch.randn_like(tokens)).sum().backward()
    untrained = [name for name, weight in connector.named_parameters() if weight.grad is None]
    assert not untrained
    # a key's bias moves all scores of a query alike: its gradient is rounding, here below 1e-9
    still = [name for name, weight in connector.named_parameters() if not weight.grad.abs().max() > 1e-8]
    assert all(name.endswith("key.bias") for name in still)
    assert features.grad is not None
    assert (features.grad.abs().amax(-1) > 0).all(), "a patch is not read"
    # each tile is by itself
    assert torch.allclose(connector(features[1:2]), tokens[1:2], atol=1e-6)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("kind", CONNECTORS)
def test_fresh_norms_are_ones_and_biases_zero(kind: str) -> None:
    connector = build(read(kind, **SMALL_CONNECTORS[kind]), 16)
    initialize_weights([Model(connector)], seed=1)
    for name, weight in connector.named_parameters():
        if "norm" in name and name.endswith(".weight"):
            assert (weight == 1).all(), name
        elif name.endswith(".bias"):
            assert (weight == 0).all(), name
        else:
            # 0.02 is every kind's default; the smallest matrix here has 72 numbers
            assert 0.01 < weight.std() < 0.03, name


REFUSED = [
    (
        "average_pooling",
        {"num_tokens": 4},
        17,
        r"kind='average_pooling': works on a square .* gives 17 features .* 16\)",
    ),
    ("c_abstractor", {"num_tokens": 9}, 10, r"kind='c_abstractor': works on a square of patches"),
    ("average_pooling", {"num_tokens": 12}, 16, r"num_tokens=12: kind 'average_pooling' gives a square.* 9 or 16"),
    ("c_abstractor", {"num_tokens": 144}, 100, r"num_tokens=144: kind 'c_abstractor' pools, .* gives only 100"),
    ("shared_mlp", {}, 49, r"needs a square of patches with an even side, and model\.vision gives 49"),
]


@pytest.mark.parametrize(("kind", "fields", "num_patches", "message"), REFUSED)
def test_grids_that_do_not_fit_are_named(kind: str, fields: dict[str, Any], num_patches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(kind, **fields).tokens_per_tile(num_patches)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("attention_pooling", {"num_attention_heads": 7}, r"num_attention_heads=7: kind 'attention_pooling' .* 1024"),
        ("qformer", {"hidden_size": 100}, r"num_attention_heads=12: kind 'qformer' shares a width of 100"),
        ("c_abstractor", {"group_size": 3}, r"group_size=3: does not divide hidden_size=1024"),
        ("shared_mlp", {"weights": [0.5, 0.6]}, r"weights=\[0\.5, 0\.6\]: their sum is 1\.1, and must be 1"),
    ],
)
def test_wrong_fields_are_named(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(kind, **fields)


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads=16: kind 'visual_abstractor' shares a width of 40"):
        build(read("visual_abstractor"), 16, width=40)
    with pytest.raises(ValueError, match=r"weights=\[0\.5, 0\.3, 0\.2\]: are 3, and model\.vision gives .* width 32"):
        build(read("shared_mlp", weights=[0.5, 0.3, 0.2]), 16)


@pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if kind not in ("linear", "mlp", "shared_mlp")])
def test_fp8_is_refused_where_there_is_none(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"engine\.fp8\.connector='fp8': .*kind='{kind}' have no FP8"):
        build(read(kind, **SMALL_CONNECTORS[kind]), 16, fp8="e4m3")


def test_class_token_counts_where_it_is_read() -> None:
    tokens = {kind: read(kind).tokens_per_tile(257) for kind in ("qformer", "visual_abstractor", "resampler")}
    assert tokens == {"qformer": 32, "visual_abstractor": 65, "resampler": 64}
    assert read("visual_abstractor", end_token=False).tokens_per_tile(257) == 64
    assert [read("average_pooling", num_tokens=n).tokens_per_tile(576) for n in (64, 144)] == [64, 144]


def c_abstractor_size(width: int, hidden: int, num_patches: int) -> int:
    """By hand: 6 blocks of 1024 channels, the first of them reading ``width``."""

    def block(inputs: int) -> int:
        squeezed = inputs // 4
        norms, excitation = 3 * 2 * 1024, 1024 * squeezed + squeezed + squeezed * 1024 + 1024
        shortcut = 0 if inputs == 1024 else inputs * 1024 + 2 * 1024
        return inputs * 1024 + 9 * 1024 + 1024 * 1024 + norms + excitation + shortcut

    return num_patches * width + block(width) + 5 * block(1024) + (1024 + 1) * hidden + (hidden + 1) * hidden


BERT_LAYER = 4 * (768 * 768 + 768) + 2 * 768 + 768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768
CROSS = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
OWL_LAYER = 4 * (1024**2 + 1024) + 3 * 2 * 1024 + 2 * (1024 * 4096 + 4096) + 2 * 4096 + 4096 * 1024 + 1024

SIZES = [  # kind, fields, patches, width, language model's width, parameters
    ("linear", {}, 256, 1024, 4096, 1025 * 4096),  # LLaVA
    ("average_pooling", {"num_tokens": 144}, 729, 1280, 2560, 1281 * 2560),
    ("shared_mlp", {}, 576, 2048, 4096, 2 * 4097 * 4096),  # POINTS: two times 4096 folded channels share it
    ("c_abstractor", {}, 729, 1280, 2560, c_abstractor_size(1280, 2560, 729)),  # MM1's ViT-H before a 3B model
    ("c_abstractor", {}, 576, 1024, 4096, c_abstractor_size(1024, 4096, 576)),  # Honeybee: CLIP-L before Vicuna-7B
    # BLIP-2 before OPT-2.7B
    ("qformer", {}, 257, 1408, 2560, 32 * 768 + 2 * 768 + 12 * BERT_LAYER + 6 * CROSS + 769 * 2560),
    ("visual_abstractor", {}, 257, 1024, 4096, 64 * 1024 + 6 * OWL_LAYER + 1025 * 4096 + 4096),  # mPLUG-Owl
    (
        "resampler",
        {},
        144,
        1536,
        4096,
        64 * 1536 + 6 * (3 * 2 * 1536 + 4 * 1536**2 + 2 * 4 * 1536**2) + 2 * 1536 + 1536 * 4096,
    ),
    (
        "attention_pooling",
        {},
        576,
        1024,
        2560,
        144 * 1024 + 2 * 1024 + 4 * (1024**2 + 1024) + 1025 * 2560,
    ),
]


@pytest.mark.usefixtures("_meta")
@pytest.mark.parametrize(("kind", "fields", "num_patches", "width", "hidden", "size"), SIZES)
def test_published_sizes(
    kind: str, fields: dict[str, Any], num_patches: int, width: int, hidden: int, size: int
) -> None:
    connector = build(read(kind, **fields), num_patches, width, hidden)
    assert all(parameter.is_meta for parameter in connector.parameters())
    assert sum(parameter.numel() for parameter in connector.parameters()) == size


def test_published_sizes_in_millions() -> None:
    """Of BLIP-2's 188 M, text has the rest: embeddings, feed-forward layers, heads."""
    text = 12 * (768 * 3072 + 3072 + 3072 * 768 + 768 + 2 * 768) + (30523 + 512) * 768
    vision = 32 * 768 + 2 * 768 + 12 * BERT_LAYER + 6 * CROSS
    assert round(vision / 1e6, 1) == 105.2
    assert 185e6 < vision + text < 189e6


@pytest.mark.usefixtures("_one_rank")
def test_average_pooling_takes_means_of_windows() -> None:
    connector = build(read("average_pooling", num_tokens=4, bias=False), 16, hidden=WIDTH)
    connector.projection.weight.data.copy_(torch.eye(WIDTH))
    numbers = torch.arange(16.0).view(1, 16, 1).expand(1, 16, WIDTH)
    # rows 0 1 2 3 / 4 5 6 7 / 8 ... : the means of 2 x 2 blocks
    assert connector(numbers)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    overlapping = build(read("average_pooling", num_tokens=9, bias=False), 16, hidden=WIDTH)
    overlapping.projection.weight.data.copy_(torch.eye(WIDTH))
    assert overlapping(numbers)[0, :3, 0].tolist() == [2.5, 3.5, 4.5]


@pytest.mark.usefixtures("_one_rank")
def test_shared_mlp_is_one_mlp_and_an_average_behind_it() -> None:
    config = read("shared_mlp", weights=[0.25, 0.75])
    connector = build(config, 16)
    initialize_weights([Model(connector)], seed=1)
    features = torch.randn(2, 16, WIDTH)
    first, second = features.chunk(2, dim=-1)
    expected = 0.25 * connector.mlp(first) + 0.75 * connector.mlp(second)
    assert torch.allclose(connector(features), expected, atol=1e-7)
    before = connector.mlp(0.25 * first + 0.75 * second)
    assert not torch.allclose(connector(features), before, atol=1e-4), "the average stands before the GELU"


@pytest.mark.usefixtures("_one_rank")
def test_visual_abstractor_adds_to_normed_queries_and_ends_a_tile() -> None:
    connector = build(read("visual_abstractor", num_queries=2, num_layers=1, num_attention_heads=2), 16)
    initialize_weights([Model(connector)], seed=1)
    layer = connector.layers[0]
    for weight in (layer.attention.output.weight, layer.down.weight):
        weight.data.zero_()
    normed = torch.nn.functional.layer_norm(connector.queries, (WIDTH,), eps=1e-6)
    tokens = connector(torch.randn(3, 16, WIDTH))
    assert torch.allclose(tokens[0, :2], connector.projection(normed), atol=1e-6)
    assert torch.equal(tokens[:, 2], connector.end_token.expand(3, -1))


def regnet_block(block: torch.nn.Module, image: Tensor, groups: int) -> Tensor:
    """RegNet's bottleneck by torch's convolutions, channels first: ``[T, C, h, w]``."""

    def norm(states: Tensor, layer: torch.nn.Module) -> Tensor:
        normed = F.layer_norm(states.permute(0, 2, 3, 1), (states.shape[1],), layer.weight, layer.bias, 1e-5)
        return normed.permute(0, 3, 1, 2)

    def one_by_one(states: Tensor, layer: torch.nn.Linear) -> Tensor:
        return F.conv2d(states, layer.weight[:, :, None, None], layer.bias)

    states = F.silu(norm(one_by_one(image, block.reduce), block.reduce_norm))
    states = F.silu(norm(F.conv2d(states, block.mix, padding=1, groups=groups), block.mix_norm))
    gate = one_by_one(F.silu(one_by_one(states.mean((2, 3), keepdim=True), block.squeeze)), block.excite)
    states = norm(one_by_one(states * gate.sigmoid(), block.expand), block.expand_norm)
    if block.shortcut is not None:
        image = norm(one_by_one(image, block.shortcut), block.shortcut_norm)
    return F.silu(states + image)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("group_size", [1, 8])
def test_c_abstractor_is_convolutions_around_a_pooling(group_size: int) -> None:
    config = read("c_abstractor", num_tokens=9, hidden_size=24, depth=2, group_size=group_size)
    connector = build(config, 36)
    torch.manual_seed(2)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, 36, WIDTH)
    image = (features + connector.positions).transpose(1, 2).unflatten(2, (6, 6))
    for block in connector.before_pooling:
        image = regnet_block(block, image, 24 // group_size)
    image = F.adaptive_avg_pool2d(image, 3)
    for block in connector.behind_pooling:
        image = regnet_block(block, image, 24 // group_size)
    first, last = connector.mlp
    expected = last(F.silu(first(image.flatten(2).transpose(1, 2))))
    # Worst seen: 3.6e-7 of values up to 2.2.
    torch.testing.assert_close(connector(features), expected, rtol=1e-4, atol=1e-5)
    assert connector.before_pooling[0].shortcut is not None
    assert connector.before_pooling[1].shortcut is None


@pytest.mark.usefixtures("_one_rank")
def test_c_abstractor_takes_positions_of_another_resolution() -> None:
    config = read("c_abstractor", num_tokens=4, hidden_size=24, depth=1, position_side=3)
    connector = build(config, 36)  # 6 x 6 patches
    assert connector.positions.shape == (9, WIDTH), "as they were learned, so that a checkpoint fits"
    torch.manual_seed(2)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, 36, WIDTH)
    same = build(read("c_abstractor", num_tokens=4, hidden_size=24, depth=1), 36)
    weights = dict(connector.state_dict())
    grid = weights["positions"].T.reshape(1, WIDTH, 3, 3)
    stretched = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    weights["positions"] = stretched[0].flatten(1).T
    same.load_state_dict(weights)
    torch.testing.assert_close(connector(features), same(features), rtol=0, atol=0)
    # the corners of the grid keep their meaning: a flat field stays flat, a slope stays a slope
    assert torch.equal(stretch(torch.ones(9, 2), 6), torch.ones(36, 2))
    slope = stretch(torch.arange(3.0).repeat(3)[:, None], 6).unflatten(0, (6, 6))
    assert (slope[:, 1:] >= slope[:, :-1]).all()
    assert torch.equal(slope[0], slope[5])
