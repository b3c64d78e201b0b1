"""LoRA under every way of splitting equals one process; what it is merged into computes the same."""

import functools
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_layouts import LAYOUTS, assert_equal
from tiny_vlm import TINY, Outcome, assemble, build_tiny, mixed_batches, train_tiny

from megavlm.models.lora import FEED_FORWARD_PROJECTIONS, merge_lora
from megavlm.models.part import part_of

EVERYTHING = {
    "r": 3,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", *FEED_FORWARD_PROJECTIONS],
}
QUERIES_AND_VALUES = {"r": 4, "layers_to_transform": [1, 2]}


def with_lora(lora: dict[str, Any] | None) -> dict[str, Any]:
    return {**TINY, "language": {**TINY["language"], "lora": lora}}


@functools.cache
def reference(trainable: tuple[str, ...], name: str) -> list[Outcome]:
    engine = {"use_distributed_optimizer": False}
    return run_ranks(train_tiny, 1, engine, trainable, 3, with_lora(SETTINGS[name]), 0.0)


SETTINGS: dict[str, dict[str, Any]] = {"everything": EVERYTHING, "queries and values": QUERIES_AND_VALUES}


# Tolerances: those of test_layouts.
@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "pp2", "dp2"])
def test_lora_alone_equals_one_process(layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    expected = reference(("lora",), "everything")
    gradients = assemble(expected)
    assert {part_of(key) for key in gradients} == {"lora"}
    assert len(gradients) == 4 * 7 * 2  # A and B of each projection in each layer
    assert all(abs(values).max() > 1e-6 for values in gradients.values()), "a gradient is missing"
    engine = {**engine, "use_distributed_optimizer": False}
    outcomes = run_ranks(train_tiny, world_size, engine, ("lora",), 3, with_lora(EVERYTHING), 0.0)
    assert_equal(outcomes, expected)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_lora_beside_other_parts_equals_one_process(layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    trainable = ("connector", "language", "lora")
    expected = reference(trainable, "queries and values")
    engine = {**engine, "use_distributed_optimizer": False}
    outcomes = run_ranks(train_tiny, world_size, engine, trainable, 3, with_lora(QUERIES_AND_VALUES), 0.0)
    assert_equal(outcomes, expected)


def merge_trained(engine_config: dict[str, Any]) -> tuple[int, float, float]:
    """On ranks: give LoRA weights; return merged layers, what LoRA changes of the loss, and what merging changes."""
    engine, chunks = build_tiny({**engine_config, "use_distributed_optimizer": False}, ("lora",), with_lora(EVERYTHING))
    batches = mixed_batches(1)
    plain = engine.evaluate(batches).loss
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(".b"):
                generator = torch.Generator().manual_seed(len(name))
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted = engine.evaluate(batches).loss
    merged = merge_lora(chunks)
    after = engine.evaluate(batches).loss
    assert merge_lora(chunks) == merged
    again = engine.evaluate(batches).loss
    assert again == after, "what is merged is added once"
    return merged, abs(adapted - plain) / plain, abs(after - adapted) / plain


@pytest.mark.parametrize(("layout", "num_layers"), [("tp2_sp", 16), ("pp2", 8)])
def test_merging_keeps_the_function_on_every_rank(layout: str, num_layers: int) -> None:
    world_size, engine = LAYOUTS[layout]
    for merged, by_lora, by_merging in run_ranks(merge_trained, world_size, engine):
        assert merged == num_layers
        assert by_lora > 1e-3
        # The bound is that of sums in another order.
        assert by_merging < 2e-6
