"""Mixtures of experts: every layout, dispatcher and implementation gives the losses and gradients of one process."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run_ranks
from test_cross_attention import begin, resume
from test_generation import answers
from test_layouts import assert_equal
from tiny_vlm import ADDING_H, ALL_PARTS, TINY, Outcome, X, assemble, train_tiny

from megavlm.inference.sampling import Sampling

MOE = {"num_moe_experts": 4, "moe_layer_freq": [0, 1, 0, 1], "moe_ffn_hidden_size": 48, "moe_z_loss_coeff": 1e-2}


def with_experts(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**model, "language": {**model["language"], "moe": {**MOE, "moe_aux_loss_coeff": 0.1, **changes}}}


MODELS: dict[str, dict[str, Any]] = {
    "D": with_experts(TINY),
    "D_sequence": with_experts(TINY, moe_router_load_balancing_type="seq_aux_loss", moe_router_pre_softmax=True),
    "D_top1": with_experts(TINY, moe_router_topk=1, moe_router_pre_softmax=True, moe_layer_freq=1),
    "D_first_half": with_experts(TINY, moe_layer_freq=[1, 1, 0, 0]),
    "X": with_experts(X, moe_layer_freq=2),
    "H": with_experts(ADDING_H, num_moe_experts=8, moe_layer_freq=1),
}

EP2 = {"expert_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
SEQUENTIAL = {"moe_grouped_gemm": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sequential": (1, SEQUENTIAL),
    "allgather": (1, ALLGATHER),
    "dp2": (2, {}),
    "ep2": (2, EP2),
    "ep2_sequential": (2, {**EP2, **SEQUENTIAL}),
    "ep2_allgather": (2, {**EP2, **ALLGATHER}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "dp2_ep2": (4, EP2),
    "tp2": (2, TP2_SP),
    "tp2_etp1": (2, {**TP2_SP, "expert_tensor_parallel_size": 1}),
    "tp2_ep2": (2, {**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}),
    "tp2_ep2_etp2": (4, {**TP2_SP, **EP2}),
    "tp2_ep2_etp2_allgather": (4, {**TP2_SP, **EP2, **ALLGATHER}),
    "pp2_ep2": (4, {**PP2, **EP2}),
    "pp2_ep2_allgather": (4, {**PP2, **EP2, **ALLGATHER}),
    "tp2_pp2_vpp2_ep2": (
        4,
        {**TP2_SP, **PP2, **EP2, "virtual_pipeline_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "recompute": (
        2,
        {**EP2, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "recompute_moe": (2, {**TP2_SP, "recompute_granularity": "selective", "recompute_modules": ["moe"]}),
}
OF_OTHER_MODELS = ("ep2", "tp2_etp1", "tp2_ep2_etp2", "pp2_ep2")
TESTED = [
    *(("D", layout) for layout in LAYOUTS),
    *((model, layout) for model in MODELS if model != "D" for layout in OF_OTHER_MODELS),
]


@functools.cache
def reference(model: str) -> list[Outcome]:
    """One process, computed once for each model."""
    return run_ranks(train_tiny, 1, {"use_distributed_optimizer": False}, ALL_PARTS, 3, MODELS[model], 0.0)


@pytest.mark.parametrize(("model", "layout"), TESTED)
def test_layout_equals_one_process(model: str, layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    expected = reference(model)
    outcomes = run_ranks(
        train_tiny, world_size, {**engine, "use_distributed_optimizer": False}, ALL_PARTS, 3, MODELS[model], 0.0
    )
    assert all(abs(values).max() > 1e-6 for values in assemble(expected).values()), "a gradient is missing"
    assert_equal(outcomes, expected)


@pytest.mark.parametrize(
    ("model", "layout"), [("D", "ep2"), ("D", "tp2_etp1"), ("D", "pp2_ep2"), ("D_first_half", "pp2_ep2")]
)
def test_distributed_optimizer_clips_and_updates_as_one_process_does(model: str, layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    expected = run_ranks(train_tiny, 1, {"use_distributed_optimizer": False}, ALL_PARTS, 4, MODELS[model])[0]
    assert min(expected.grad_norms) > 1.0, "nothing is clipped"
    for outcome in run_ranks(train_tiny, world_size, engine, ALL_PARTS, 4, MODELS[model]):
        # worst seen: 1.5e-6
        np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(outcome.grad_norms, expected.grad_norms, rtol=2e-5)


# ---- checkpoints -------------------------------------------------------------------------------------------------

BEFORE = "tp2_ep2_etp2"
AFTER = ("tp2_ep2_etp2", "sequential", "dp2", "ep2", "ep4", "tp2_etp1", "pp2_ep2", "ep2_sequential")


def test_training_goes_on_under_the_same_and_other_layouts(tmp_path: Path) -> None:
    world_size, engine = LAYOUTS[BEFORE]
    expected = run_ranks(begin, world_size, tmp_path, engine, MODELS["D"])[0]
    for layout in AFTER:
        world_size, engine = LAYOUTS[layout]
        results = run_ranks(resume, world_size, tmp_path, engine, MODELS["D"])[0]
        if layout == BEFORE:
            assert results == expected
        else:
            np.testing.assert_allclose(results, expected, rtol=1e-5, err_msg=layout)


# ---- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "layout"), [("D", {}), ("H", {"tensor_model_parallel_size": 2})])
def test_cached_tokens_are_those_of_whole_sequences(model: str, layout: dict[str, Any]) -> None:
    outcomes = run_ranks(answers, 2 if layout else 1, layout, MODELS[model], Sampling())
    cached, whole, alone = outcomes[0]
    assert cached == whole == alone
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert len({tuple(answer) for answer in cached}) > 1, "every prompt gets the same answer"
