"""Checkpoints across layouts: training goes on as if nothing had happened, whatever the ranks were before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_model
import pytest
from harness import run_ranks

from megavlm.checkpoint import AsyncSaver, load_checkpoint, save_checkpoint

ONE = {}
DP2 = {}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TP2_SP_PP2 = {**TP2_PP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP2_VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}

NUM_STEPS = 3


def trains_all(key: str) -> bool:
    return True


def trains_some_layers(key: str) -> bool:
    """Part of the layers of each stage."""
    return "layers.1." in key or "layers.3." in key or "final_layernorm" in key


def trains_first_stage(key: str) -> bool:
    """As in the connector stage of a VLM: the last pipeline stage has nothing to train."""
    return "embedding" in key


def trains_last_stage(key: str) -> bool:
    """The first pipeline stage, and with it rank 0, has nothing to train."""
    return "output_layer" in key


def save_then_train(folder: Path, layout: dict[str, Any], trains: Callable[[str], bool], asynchronous: bool) -> list:
    engine = checkpoint_model.build(layout, trains=trains)
    checkpoint_model.train(engine, 0, NUM_STEPS)
    extra = {"consumed_samples": NUM_STEPS * checkpoint_model.GLOBAL_BATCH_SIZE}
    files = {"recipe.yaml": "a: 1\n"}
    if asynchronous:
        saver = AsyncSaver()
        saver.save(folder, NUM_STEPS, engine, extra, files)
        results = checkpoint_model.train(engine, NUM_STEPS, NUM_STEPS)
        saver.finish()
        return results
    save_checkpoint(folder, NUM_STEPS, engine, extra, files)
    return checkpoint_model.train(engine, NUM_STEPS, NUM_STEPS)


def load_then_train(folder: Path, layout: dict[str, Any], trains: Callable[[str], bool]) -> list[float]:
    engine = checkpoint_model.build(layout, trains=trains, seed=99)
    loaded = load_checkpoint(folder, engine, with_optimizer=True)
    assert loaded.iteration == NUM_STEPS
    assert loaded.extra == {"consumed_samples": NUM_STEPS * checkpoint_model.GLOBAL_BATCH_SIZE}
    return checkpoint_model.train(engine, NUM_STEPS, NUM_STEPS)


@pytest.mark.parametrize(
    ("before", "trains", "asynchronous"),
    [
        ((4, TP2_PP2), trains_all, False),
        ((4, TP2_SP_PP2), trains_some_layers, False),
        ((2, PP2), trains_first_stage, False),
        ((2, PP2), trains_last_stage, False),
        ((2, DP2), trains_all, True),
    ],
)
def test_training_goes_on_under_another_layout(
    tmp_path: Path, before: tuple[int, dict], trains: Callable[[str], bool], asynchronous: bool
) -> None:
    num_ranks, layout = before
    expected = run_ranks(save_then_train, num_ranks, tmp_path, layout, trains, asynchronous)[0]
    import json, os
    print("sum", sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))
    for num_ranks, layout in ((1, ONE), (2, DP2), (2, PP2_VPP2), (4, TP2_PP2), (4, PP2), (2, TP2)):
        results = run_ranks(load_then_train, num_ranks, tmp_path, layout, trains)[0]
        print(layout, max(abs(a-b)/abs(b) for a,b in zip(results, expected)))
        assert results == pytest.approx(expected, rel=1e-5), layout
