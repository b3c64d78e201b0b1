"""Packed rows give the loss and gradients of one sample a row; weights and sources keep their meaning in both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from tiny_vlm import ADDING_H, TILE_SIZE, TINY, H, Outcome, X, assemble, build_tiny, gradient_shards, make_sample

from megavlm.batch import Batch, TileRoute
from megavlm.data import Sample, pack
from megavlm.engines import LossSums, OptimizerSettings

MODELS = {"D": TINY, "X": X, "H": H, "H_adding": ADDING_H}

# Tiles of each image of each sample, with the length of its text.
MIXED: list[tuple[list[int], int]] = [
    ([3], 30),
    ([], 9),
    ([1, 4], 40),
    ([2], 24),
    ([], 17),
    ([2, 1, 1], 44),
    ([], 5),
    ([1], 12),
]
TEXTS: list[tuple[list[int], int]] = [([], length) for length in (9, 17, 5, 12, 30, 8, 22, 14)]
SAMPLES = {"mixed": MIXED, "texts": TEXTS}

# Which samples stand in the rows of each micro-batch.
ALONE = [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
PACKED = [[[0, 1, 6], [2]], [[7, 4, 3], [5]]]
ONE_ROW = [[[3, 1, 0, 6]], [[5, 7, 4, 2]]]


@dataclass
class Step:
    """What a step gave on one rank."""

    loss: float
    num_trained_tokens: int
    source_losses: tuple[float, ...]
    evaluated: LossSums
    outcome: Outcome


def make_samples(sizes: Sequence[tuple[list[int], int]], route: TileRoute, weight: float | None) -> list[Sample]:
    """Samples of two sources in turn; ``weight`` of each token, None: one for each sample."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for number, (images, length) in enumerate(sizes):
        sample = make_sample(images, generator, length, route)
        factor = weight if weight is not None else 1.0 / sample.num_trained_tokens
        samples.append(replace(sample, source=number % 2, loss_mask=sample.loss_mask * factor))
    return samples


def make_batches(
    sizes: Sequence[tuple[list[int], int]],
    layout: Sequence[Sequence[Sequence[int]]],
    route: TileRoute,
    weight: float | None = 1.0,
) -> list[Batch]:
    samples = make_samples(sizes, route, weight)
    return [
        pack(
            [[samples[number] for number in row] for row in rows],
            pad_id=0,
            tile_size=TILE_SIZE,
            uses_context=route.uses_context,
        )
        for rows in layout
    ]


def row_borders(batch: Batch) -> torch.Tensor:
    return torch.arange(0, batch.tokens.numel() + 1, batch.tokens.shape[1], dtype=torch.int32)


def take_step(
    model: dict[str, Any],
    sizes: Sequence[tuple[list[int], int]],
    layout: Sequence[Sequence[Sequence[int]]],
    weight: float | None = 1.0,
    is_leaky: bool = False,
) -> Step:
    engine, chunks = build_tiny({"use_distributed_optimizer": False}, model=model)
    engine.loss.num_sources = 2
    engine.build_optimizer(OptimizerSettings(lr=1e-2, clip_grad=0.0))
    batches = make_batches(sizes, layout, chunks[0].route, weight)
    if is_leaky:  # as if the samples of a row were one
        batches = [replace(batch, cu_seqlens=row_borders(batch), sources=batch.sources[:1]) for batch in batches]
    own = batches[engine.data_parallel_rank :: engine.data_parallel_size]
    evaluated = engine.evaluate(own)
    result = engine.train_step(own)
    outcome = Outcome([result.loss], [result.grad_norm], gradient_shards(chunks))
    return Step(result.loss, result.num_trained_tokens, result.source_losses, evaluated, outcome)


def compare(found: list[Step], expected: list[Step]) -> None:
    """Measured worst over all cases: loss 6e-8, gradients 5.1e-6 of the largest of their tensor (order of sums)."""
    assert found[0].num_trained_tokens == expected[0].num_trained_tokens
    np.testing.assert_allclose(found[0].loss, expected[0].loss, rtol=1e-6)
    np.testing.assert_allclose(found[0].source_losses, expected[0].source_losses, rtol=1e-6)
    full, reference = (assemble([step.outcome for step in steps]) for steps in (found, expected))
    assert full.keys() == reference.keys()
    for key, gradient in reference.items():
        np.testing.assert_allclose(full[key], gradient, rtol=0, atol=2e-5 * np.abs(gradient).max() + 1e-9, err_msg=key)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sizes", SAMPLES)
def test_packed_rows_give_the_same_loss_and_gradients(model: str, sizes: str) -> None:
    expected = run_ranks(take_step, 1, MODELS[model], SAMPLES[sizes], ALONE)
    compare(run_ranks(take_step, 1, MODELS[model], SAMPLES[sizes], PACKED), expected)
    compare(run_ranks(take_step, 2, MODELS[model], SAMPLES[sizes], ONE_ROW), expected)


@pytest.mark.parametrize("model", ["D", "X", "H"])
def test_without_boundaries_they_would_not(model: str) -> None:
    """What the test above compares is not the same whatever the mask."""
    [expected] = run_ranks(take_step, 1, MODELS[model], MIXED, ONE_ROW)
    [leaky] = run_ranks(take_step, 1, MODELS[model], MIXED, ONE_ROW, 1.0, True)
    assert abs(leaky.loss - expected.loss) > 1e-3


def test_weights_that_are_all_alike_change_nothing() -> None:
    expected = run_ranks(take_step, 1, TINY, MIXED, ALONE)
    compare(run_ranks(take_step, 1, TINY, MIXED, PACKED, 3.0), expected)


def test_samples_that_count_alike_give_the_mean_of_their_means() -> None:
    """Weighted by one over its length, every sample's mean loss counts alike, packed over two ranks or alone."""
    alone = [[[number]] for number in range(8)]
    single = [run_ranks(take_step, 1, TINY, [size], [[[0]]]) for size in TEXTS]
    assert len(single) == 8
    weighted = run_ranks(take_step, 1, TINY, TEXTS, alone, None)
    compare(run_ranks(take_step, 2, TINY, TEXTS, ONE_ROW, None), weighted)
    sums = [sum(step.source_losses) for [step] in single]
    assert sums == pytest.approx([step.loss * step.num_trained_tokens for [step] in single], rel=1e-6)


def test_a_validation_loss_counts_all_trained_tokens_alike() -> None:
    [plain] = run_ranks(take_step, 1, TINY, MIXED, PACKED)
    [weighted] = run_ranks(take_step, 1, TINY, MIXED, PACKED, None)
    assert weighted.evaluated == plain.evaluated
    assert plain.evaluated.num_trained_tokens == plain.num_trained_tokens
    assert plain.evaluated.loss == pytest.approx(plain.loss * plain.num_trained_tokens, rel=1e-6)
    assert abs(weighted.loss - plain.loss) > 1e-3


def test_losses_are_told_apart_by_source() -> None:
    [step] = run_ranks(take_step, 1, TINY, MIXED, PACKED)
    assert len(step.source_losses) == 2
    assert sum(step.source_losses) == pytest.approx(step.loss * step.num_trained_tokens, rel=1e-6)
    halves = [[[0], [2], [4], [6]]], [[[1], [3], [5], [7]]]
    for source, layout in enumerate(halves):
        [half] = run_ranks(take_step, 1, TINY, MIXED, layout)
        assert half.source_losses[source] == pytest.approx(step.source_losses[source], rel=1e-6)
        assert half.source_losses[1 - source] == 0.0
