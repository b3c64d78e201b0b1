"""Every layout gives the losses, gradient norms and gradients of one process, on mixed batches."""

import functools
from typing import Any

import numpy as np
import pytest
from harness import run_ranks
from small_connectors import SMALL_CONNECTORS, small_model
from tiny_vlm import ADDING_H, FLAMINGO, TINY, H, Outcome, X, assemble, train_tiny

from megavlm.models.part import Trainable, part_of

PP2_VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2_vpp2": (2, PP2_VPP2),
    "tp2_sp_pp2": (4, {**TP2_SP, "pipeline_model_parallel_size": 2}),
    "dp2_tp2_sp": (4, TP2_SP),
    "dp2_pp2": (4, {"pipeline_model_parallel_size": 2}),
    "tp2_sp_pp2_vpp2": (4, {**TP2_SP, **PP2_VPP2}),
    "recompute": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "tp2_sp_recompute": (2, {**TP2_SP, "recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    "recompute_parts": (
        1,
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
    ),
}

SWIGLU = {**FLAMINGO, "fusion": {**FLAMINGO["fusion"], "feed_forward": {"ffn_hidden_size": 48, "activation": "swiglu"}}}
MODELS: dict[str, dict[str, Any]] = {
    "D": TINY,
    "X": X,
    "H": H,
    "H_adding": ADDING_H,
    "Flamingo": FLAMINGO,
    "Flamingo_swiglu": SWIGLU,
}
CONTEXT_LAYOUTS = ("dp2", "tp2_sp", "pp2", "tp2_sp_pp2", "pp2_vpp2", "recompute")
TESTED = [
    *(("D", layout) for layout in LAYOUTS),
    *((model, layout) for model in ("X", "H", "Flamingo") for layout in (*CONTEXT_LAYOUTS, "tp2", "tp2_sp_pp2_vpp2")),
    ("Flamingo", "recompute_parts"),
    ("Flamingo_swiglu", "tp2_sp"),
    *(("H_adding", layout) for layout in ("tp2_sp", "pp2")),
]

FROZEN: dict[str, tuple[str, ...]] = {
    "connector_only": ("connector",),  # stage 1 of NVLM
    "connector_and_language": ("connector", "language"),  # stage 2
    "vision_only": ("vision",),
    "all": ("vision", "connector", "cross_attention", "language"),
}

# Worst seen with everything trained: loss 9.2e-8, gradient norm 8.9e-7 (relative), gradients 1.3e-6 (absolute, where
# the largest is 0.1): float32 sums in another order.
LOSS_TOLERANCE = 5e-6
NORM_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 5e-6


@functools.cache
def reference(trainable: tuple[str, ...], model: str = "D") -> list[Outcome]:
    """One process, computed once for each set of trained parts and each model."""
    return run_ranks(train_tiny, 1, {"use_distributed_optimizer": False}, trainable, 3, MODELS[model], 0.0)


def assert_equal(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, expected[0].losses, rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(outcome.grad_norms, expected[0].grad_norms, rtol=NORM_TOLERANCE)
    gradients, wanted = assemble(outcomes), assemble(expected)
    assert gradients.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_allclose(gradients[key], values, rtol=1e-3, atol=GRADIENT_TOLERANCE, err_msg=key)


@pytest.mark.parametrize(("model", "layout"), TESTED)
def test_layout_equals_one_process(model: str, layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    expected = reference(FROZEN["all"], model)
    outcomes = run_ranks(
        train_tiny, world_size, {**engine, "use_distributed_optimizer": False}, FROZEN["all"], 3, MODELS[model], 0.0
    )
    assert all(abs(values).max() > 1e-6 for values in assemble(expected).values()), "a gradient is missing"
    assert_equal(outcomes, expected)


# Other layouts cut the model elsewhere: a connector is whole on the first stage and on every tensor-parallel rank.
CONNECTORS_TESTED = [
    *((kind, "tp2_sp") for kind in SMALL_CONNECTORS if kind not in ("mlp", "linear")),
    *((kind, layout) for kind in ("c_abstractor", "qformer") for layout in ("dp2", "tp2", "pp2")),
]


# Worst seen: loss 1.3e-7, gradient norm 1.5e-6 (relative); gradients as above.
@pytest.mark.parametrize(("kind", "layout"), CONNECTORS_TESTED)
def test_connectors_equal_one_process(kind: str, layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    engine = {**engine, "use_distributed_optimizer": False}
    expected = connector_reference(kind)
    assert_equal(run_ranks(train_tiny, world_size, engine, FROZEN["all"], 2, small_model(kind, TINY), 0.0), expected)


@functools.cache
def connector_reference(kind: str) -> list[Outcome]:
    """One process, computed once for each kind of connector."""
    engine = {"use_distributed_optimizer": False}
    return run_ranks(train_tiny, 1, engine, FROZEN["all"], 2, small_model(kind, TINY), 0.0)


@pytest.mark.parametrize("frozen", ["connector_only", "connector_and_language", "vision_only"])
@pytest.mark.parametrize("layout", ["dp2", "pp2", "tp2_sp_pp2", "pp2_vpp2"])
def test_frozen_parts_under_layouts(layout: str, frozen: str) -> None:
    world_size, engine = LAYOUTS[layout]
    trainable = FROZEN[frozen]
    expected = reference(trainable)
    assert {key.split(".")[0] for key in assemble(expected)} == set(trainable)
    engine = {**engine, "use_distributed_optimizer": False}
    assert_equal(run_ranks(train_tiny, world_size, engine, trainable, 3, None, 0.0), expected)


# One layer in the middle of the language model: under pp2 x vpp2 it is the first of a chunk. The last of the encoder.
MODULES = Trainable(
    frozenset({"vision", "connector", "language"}),
    {"vision": ["encoder.layers.1"], "connector": ["*_fc2"], "language": ["decoder.layers.2-2"]},
)


@functools.cache
def modules_reference() -> list[Outcome]:
    return run_ranks(train_tiny, 1, {"use_distributed_optimizer": False}, MODULES, 3, None, 0.0)


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp_pp2", "pp2_vpp2"])
def test_modules_of_parts_under_layouts(layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    expected = modules_reference()
    trained = list(assemble(expected))
    assert [key for key in trained if key.startswith("connector")] == ["connector.linear_fc2.weight"]
    assert not [key for key in trained if "layers" not in key and not key.startswith("connector")]
    engine = {**engine, "use_distributed_optimizer": False}
    assert_equal(run_ranks(train_tiny, world_size, engine, MODULES, 3, None, 0.0), expected)


@pytest.mark.parametrize("trainable", [("cross_attention",), ("connector", "cross_attention"), ("language",)])
@pytest.mark.parametrize(
    ("model", "layout"),
    [("X", "pp2"), ("X", "tp2_sp_pp2"), ("X", "pp2_vpp2"), ("H", "tp2_sp_pp2"), ("Flamingo", "tp2_sp_pp2")],
)
def test_frozen_parts_with_cross_attention(model: str, layout: str, trainable: tuple[str, ...]) -> None:
    world_size, engine = LAYOUTS[layout]
    expected = reference(trainable, model)
    assert {part_of(key) for key in assemble(expected)} == set(trainable)
    engine = {**engine, "use_distributed_optimizer": False}
    assert_equal(run_ranks(train_tiny, world_size, engine, trainable, 3, MODELS[model], 0.0), expected)


@pytest.mark.parametrize("model", ["X", "H"])
def test_cross_attention_with_overlap_and_distributed_optimizer(model: str) -> None:
    [expected] = run_ranks(train_tiny, 1, {}, FROZEN["all"], 3, MODELS[model])
    world_size, engine = LAYOUTS["dp2_pp2"]
    engine = {**engine, "overlap_grad_reduce": True, "overlap_param_gather": True}
    for outcome in run_ranks(train_tiny, world_size, engine, FROZEN["all"], 3, MODELS[model]):
        np.testing.assert_allclose(outcome.losses, expected.losses, rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(outcome.grad_norms, expected.grad_norms, rtol=NORM_TOLERANCE)


@pytest.mark.parametrize("layout", ["dp2", "dp2_tp2_sp", "dp2_pp2"])
def test_distributed_optimizer_gives_the_same_curve(layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    [expected] = run_ranks(train_tiny, 1, {"use_distributed_optimizer": False}, FROZEN["all"], 4)
    for outcome in run_ranks(train_tiny, world_size, engine, FROZEN["all"], 4):
        np.testing.assert_allclose(outcome.losses, expected.losses, rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(outcome.grad_norms, expected.grad_norms, rtol=NORM_TOLERANCE)


@pytest.mark.parametrize("layout", ["dp2", "dp2_pp2"])
def test_overlapped_reduction_gives_the_same_curve(layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    overlapped = {**engine, "overlap_grad_reduce": True, "overlap_param_gather": True}
    [expected] = run_ranks(train_tiny, 1, {}, FROZEN["all"], 3)
    for outcome in run_ranks(train_tiny, world_size, overlapped, FROZEN["all"], 3):
        np.testing.assert_allclose(outcome.losses, expected.losses, rtol=LOSS_TOLERANCE)


def test_tied_embeddings_under_pipeline() -> None:
    tied = {**TINY, "language": {**TINY["language"], "share_embeddings_and_output_weights": True}}
    engine = {"use_distributed_optimizer": False}
    expected = run_ranks(train_tiny, 1, engine, FROZEN["all"], 3, tied, 0.0)
    engine |= {"pipeline_model_parallel_size": 2}
    for outcome in run_ranks(train_tiny, 2, engine, FROZEN["all"], 3, tied, 0.0):
        np.testing.assert_allclose(outcome.losses, expected[0].losses, rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(outcome.grad_norms, expected[0].grad_norms, rtol=NORM_TOLERANCE)


# bfloat16 rounds each product; worst seen over these layouts: 9e-4.
@pytest.mark.parametrize(("model", "layout"), [("D", "dp2"), ("D", "tp2_sp_pp2"), ("X", "tp2_sp_pp2"), ("H", "pp2")])
def test_bf16_layouts_track_one_process(model: str, layout: str) -> None:
    world_size, engine = LAYOUTS[layout]
    [expected] = run_ranks(train_tiny, 1, {"precision": "bf16"}, FROZEN["all"], 3, MODELS[model])
    engine = {**engine, "precision": "bf16"}
    for outcome in run_ranks(train_tiny, world_size, engine, FROZEN["all"], 3, MODELS[model]):
        np.testing.assert_allclose(outcome.losses, expected.losses, rtol=5e-3)
