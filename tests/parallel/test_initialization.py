"""Fresh weights: the same under every layout, of the right spread, and of every parameter."""

from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from tiny_vlm import TINY, build_tiny, gradient_shards

WIDE = {**TINY, "language": {**TINY["language"], "hidden_size": 128, "init_method_std": 0.02}}


def weights(engine: dict[str, Any], model: dict[str, Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """Every weight of this rank, each with its place in the full tensor."""
    _, chunks = build_tiny({**engine, "use_distributed_optimizer": False}, model=model)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(parameter.detach())  # gradient_shards then gives the weights
    return gradient_shards(chunks)


def full_weights(world_size: int, engine: dict[str, Any], model: dict[str, Any] = TINY) -> dict[str, np.ndarray]:
    full: dict[str, np.ndarray] = {}
    for shards in run_ranks(weights, world_size, engine, model):
        for key, shape, offset, values in shards:
            window = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
            full.setdefault(key, np.full(shape, np.nan, np.float32))[window] = values
    return full


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ],
)
def test_every_layout_starts_from_the_same_weights(world_size: int, engine: dict[str, Any]) -> None:
    expected, got = full_weights(1, {}), full_weights(world_size, engine)
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values, err_msg=key)


def test_spread_of_fresh_weights() -> None:
    full = full_weights(1, {}, WIDE)
    depth = np.sqrt(2 * TINY["language"]["num_layers"])
    spreads = {
        "language.embedding.word_embeddings.weight": 0.02 * np.sqrt(100 / 128),  # 28 rows of padding are zero
        "language.decoder.layers.1.self_attention.linear_qkv.weight": 0.02,
        "language.decoder.layers.1.self_attention.linear_proj.weight": 0.02 / depth,
        "language.decoder.layers.1.mlp.linear_fc2.weight": 0.02 / depth,
        "connector.linear_fc1.weight": 0.2,
        "connector.linear_fc2.weight": 0.2,  # no transformer, so no residual stream
    }
    for key, std in spreads.items():
        assert full[key].std() == pytest.approx(std, rel=0.05), key
    assert (full["language.decoder.final_layernorm.weight"] == 1).all()
    assert (full["language.decoder.layers.0.self_attention.linear_qkv.bias"] == 0).all()
    assert (full["vision.encoder.layers.0.mlp_bda.weight"] == TINY["vision"]["layer_scale"]).all()
    first, second = (full[f"language.decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in (0, 1))
    assert not np.array_equal(first, second)
    assert not any(torch.from_numpy(values).isnan().any() for values in full.values())
