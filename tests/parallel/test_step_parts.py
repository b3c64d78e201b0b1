"""The parts of a step on several ranks: where communication and waiting for stages are found; nothing changes."""

import time
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny_vlm import TINY, X, build_tiny, mixed_batches

from megavlm.benchmark.breakdown import label_steps
from megavlm.benchmark.timeline import Timeline
from megavlm.engines import OptimizerSettings
from megavlm.preflight.bandwidth import COLLECTIVES, sent_share, time_collective

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "tp2": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, X, {"communication", "cross_attention"}),
    "pp2": ({"pipeline_model_parallel_size": 2}, X, {"communication", "pipeline", "cross_attention"}),
    "vpp2": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        TINY,
        {"communication", "pipeline"},
    ),
    "dp2": ({"overlap_grad_reduce": True, "overlap_param_gather": True}, TINY, {"communication"}),
}


def steps(
    config: dict[str, Any], model: dict[str, Any], is_labelled: bool
) -> tuple[list[Any], dict[str, float], float]:
    engine, chunks = build_tiny(config, model=model)
    engine.build_optimizer(OptimizerSettings(lr=1e-2))
    timeline = Timeline(engine.device)
    results, took = [], 0.0
    seconds: dict[str, float] = {}

    def step(number: int) -> None:
        batches = mixed_batches(number, chunks[0].route)[engine.data_parallel_rank :: engine.data_parallel_size]
        result = engine.train_step(batches)
        results.append((result.loss, result.grad_norm))

    if not is_labelled:
        for number in range(2):
            step(number)
        return results, seconds, took
    with label_steps(engine, timeline):
        step(0)
        start = time.perf_counter()
        timeline.start()
        step(1)
        seconds = dict(timeline.stop())
        took = time.perf_counter() - start
    return results, seconds, took


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_find_communication_and_change_nothing(layout: str) -> None:
    config, model, expected = LAYOUTS[layout]
    plain = run_ranks(steps, 2, config, model, False)
    labelled = run_ranks(steps, 2, config, model, True)
    assert [results for results, _, _ in labelled] == [results for results, _, _ in plain]
    for _, seconds, took in labelled:
        # measured difference of the two clocks: below 0.1 ms, more where the machine stops the process in between
        assert sum(seconds.values()) == pytest.approx(took, abs=0.05)
    found = set().union(*(seconds for _, seconds, _ in labelled))
    assert found == expected | {"vision", "connector", "language", "optimizer", "other"}
    if "pipeline" in expected:
        assert "vision" not in labelled[1][1], "it is on the first stage"


def bandwidths() -> dict[str, float]:
    group = torch.distributed.group.WORLD
    assert group is not None
    return {name: time_collective(name, group, torch.device("cpu"), 2**16 + 4) for name in COLLECTIVES}


def test_every_collective_is_timed_and_all_ranks_agree() -> None:
    first, *others = run_ranks(bandwidths, 3)
    assert all(seconds > 0.0 for seconds in first.values())
    assert others == [first, first]


@pytest.mark.parametrize(
    ("name", "share"), [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("send_to_next", 1.0)]
)
def test_what_a_rank_has_to_send(name: str, share: float) -> None:
    assert sent_share(name, 4) == share
