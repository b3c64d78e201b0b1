"""The DeepSpeed engine trains as the megatron engine does, and each takes up the other's runs."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from harness import run_ranks
from tiny_vlm import ALL_PARTS, IMAGE_TOKEN_ID, TINY, VOCAB_SIZE, H, X, mixed_batches, open_gates

from megavlm.checkpoint import load_checkpoint, save_checkpoint, verify
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.engines import AnyEngineConfig, MegatronEngine, OptimizerSettings, build_engine
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import Trainable
from megavlm.models.vlm import VLM
from megavlm.recipe import OptimizerConfig
from megavlm.runtime.seed import set_seed
from megavlm.training.freeze import freeze_except, scale_learning_rates, scale_weight_decay
from megavlm.training.schedule import build_schedule

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

LORA = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj"]}
MODELS: dict[str, dict[str, Any]] = {
    "D": TINY,
    "X": X,
    "H": H,
    "lora": {**TINY, "language": {**TINY["language"], "lora": LORA}},
    # of two ranks, each has a MiB of some weights, without which DeepSpeed writes no file
    "wide": {**TINY, "language": {**TINY["language"], "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 4096}},
}
RATES = {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1}
NO_SCALES: dict[str, float] = {}
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
CUT_SMALL = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2000, "reduce_bucket_size": 3000}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

# Model, ranks, stages, settings of both engines, of DeepSpeed, trained parts.
CASES: dict[str, tuple[str, int, tuple[int, ...], dict[str, Any], dict[str, Any], Sequence[str]]] = {
    "dp2": ("D", 2, (1, 2, 3), {}, {}, ALL_PARTS),
    "dp2_X": ("X", 2, (1, 2, 3), {}, CUT_SMALL, ALL_PARTS),
    "dp2_H": ("H", 2, (3,), {}, CUT_SMALL, ALL_PARTS),
    "dp2_pieces": ("D", 2, (2, 3), {}, CUT_SMALL, ALL_PARTS),
    "tp2": ("D", 2, (1, 3), TP2, {}, ALL_PARTS),
    "tp2_sp": ("D", 2, (1, 2, 3), TP2_SP, {}, ALL_PARTS),
    "dp2_tp2_sp": ("H", 4, (3,), TP2_SP, CUT_SMALL, ALL_PARTS),
    "connector_only": ("D", 2, (1, 3), {}, CUT_SMALL, ("connector",)),
    "cross_attention_only": ("X", 2, (2, 3), {}, CUT_SMALL, ("cross_attention",)),
    "recompute": ("D", 2, (3,), {}, {**CUT_SMALL, **FULL_RECOMPUTE}, ALL_PARTS),
    "offloaded_optimizer": ("D", 2, (1, 2), {}, {"offload_optimizer": "cpu"}, ALL_PARTS),
    "offloaded": ("D", 2, (3,), {}, {"offload_optimizer": "cpu", "offload_param": "cpu", **CUT_SMALL}, ALL_PARTS),
}
NUM_STEPS = {"dp2": 20, "dp2_X": 20, "tp2": 20}
TESTED = [(name, stage) for name, case in CASES.items() for stage in case[2]]

# Worst seen over 4 steps: loss 8.2e-8, gradient norm 2.1e-7 (relative); over 20 steps 1.9e-7 and 3.1e-5
# (NVLM-X): float32 sums in another order, and what the steps before made of it.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 5e-6
LATE_NORM_TOLERANCE = 2e-4


def build(
    config: dict[str, Any], model: str, trainable: Trainable | Sequence[str], scales: Mapping[str, float] = NO_SCALES
) -> tuple[MegatronEngine, VLM]:
    """An engine around a tiny model with the same weights every time."""
    engine = build_engine(pydantic.TypeAdapter(AnyEngineConfig).validate_python(config))
    engine.start()
    set_seed(3)
    chunk = VLM(
        VLMConfig.model_validate(MODELS[model]),
        engine.config.megatron_settings(),
        vocab_size=VOCAB_SIZE,
        image_token_id=IMAGE_TOKEN_ID,
    )
    initialize_weights([chunk], seed=7)
    open_gates([chunk])
    freeze_except([chunk], trainable)
    scale_learning_rates([chunk], scales)
    scale_weight_decay([chunk], scales)
    engine.wrap([chunk])
    # a large epsilon: otherwise the first steps turn the rounding of a gradient near zero into a full learning rate
    engine.build_optimizer(OptimizerSettings(**RATES, clip_grad=1.0, adam_eps=1e-4))
    return engine, chunk


def step(engine: MegatronEngine, chunk: VLM, number: int, **kwargs: Any) -> Any:
    batches = mixed_batches(number, chunk.route)
    return engine.train_step(batches[engine.data_parallel_rank :: engine.data_parallel_size], **kwargs)


def curve(
    config: dict[str, Any], model: str = "D", trainable: Sequence[str] = ALL_PARTS, num_steps: int = 4
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; a pass of evaluation lies between two of them."""
    return curve_of(*build(config, model, trainable), num_steps)


def curve_of(engine: MegatronEngine, chunk: VLM, num_steps: int) -> list[tuple[float, float]]:
    """As :func:`curve`, of what is built."""
    found = []
    for number in range(num_steps):
        result = step(engine, chunk, number)
        found.append((result.loss, result.grad_norm))
        if number == 1:
            batches = mixed_batches(9, chunk.route)
            engine.evaluate(batches[engine.data_parallel_rank :: engine.data_parallel_size])
    return found


@functools.cache
def reference(name: str) -> np.ndarray:
    model, world_size, _, shared, _, trainable = CASES[name]
    return np.array(run_ranks(curve, world_size, shared, model, trainable, NUM_STEPS.get(name, 4))[0])


def assert_close(found: Any, expected: np.ndarray) -> None:
    assert len(found) == len(expected)
    np.testing.assert_allclose(np.array(found)[:, 0], expected[:, 0], rtol=LOSS_TOLERANCE)
    np.testing.assert_allclose(np.array(found)[:4, 1], expected[:4, 1], rtol=NORM_TOLERANCE)
    np.testing.assert_allclose(np.array(found)[4:, 1], expected[4:, 1], rtol=LATE_NORM_TOLERANCE)


@pytest.mark.parametrize(("name", "stage"), TESTED)
def test_trains_as_the_megatron_engine(name: str, stage: int) -> None:
    model, world_size, _, shared, own, trainable = CASES[name]
    own = {name: value for name, value in own.items() if stage == 3 or not name.startswith("stage3")}
    config = {"kind": "deepspeed", "zero_stage": stage, **shared, **own}
    for found in run_ranks(curve, world_size, config, model, trainable, NUM_STEPS.get(name, 4)):
        assert_close(found, reference(name))
    assert reference(name)[0, 1] > 1.0 or name.endswith("_only"), "nothing is clipped"


# Worst seen: 0 at stages 1 and 2 in most runs, 1.2e-4 at stage 3 and in some: bfloat16 products of the same numbers are
# not rounded alike in every buffer. What decides it is not known.
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_tracks_the_megatron_engine(stage: int) -> None:
    [expected, _] = run_ranks(curve, 2, {"precision": "bf16"})
    [found, _] = run_ranks(curve, 2, {"kind": "deepspeed", "zero_stage": stage, "precision": "bf16"})
    np.testing.assert_allclose(np.array(found)[:, 0], np.array(expected)[:, 0], rtol=5e-3)


# ---- parts -----------------------------------------------------------------------------------------------------------

SCALES = {"vision": 0.1, "connector": 5.0}
LAST_LAYER = Trainable(frozenset({"vision", "connector"}), {"vision": ("layers.1",)})
# Model, stages, settings of both engines, trained parts, factors of their rates and decays.
PARTS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], Trainable | Sequence[str], dict[str, float]]] = {
    "dp2": ("D", (1, 2, 3), {}, ALL_PARTS, SCALES),
    "tp2_sp": ("D", (1,), TP2_SP, ALL_PARTS, SCALES),
    "frozen": ("D", (1, 3), {}, ("connector", "language"), {"connector": 5.0}),
    "within": ("D", (2, 3), {}, LAST_LAYER, {"connector": 5.0}),
    "lora": ("lora", (1, 2, 3), {}, ("connector", "lora"), {"lora": 3.0}),
    "lora_tp2_sp": ("lora", (1,), TP2_SP, ("connector", "lora"), {"lora": 3.0}),
}


def scaled_curve(
    config: dict[str, Any], model: str, trainable: Trainable | Sequence[str], scales: dict[str, float]
) -> list[tuple[float, float]]:
    """Loss and gradient norm of six steps under a schedule of warm-up and decay."""
    engine, chunk = build(config, model, trainable, scales)
    rates = OptimizerConfig(**RATES, lr_warmup_iters=2, lr_decay_iters=6)
    schedule = build_schedule(engine.optimizer, rates, train_iters=6, iteration=0)
    found = []
    for number in range(6):
        schedule.step(increment=1)
        result = step(engine, chunk, number)
        found.append((result.loss, result.grad_norm))
    return found


@functools.cache
def scaled_reference(name: str, is_scaled: bool = True) -> np.ndarray:
    model, _, shared, trainable, scales = PARTS[name]
    return np.array(run_ranks(scaled_curve, 2, shared, model, trainable, scales if is_scaled else NO_SCALES)[0])


# Worst seen over 6 steps (relative): loss 1.4e-7; gradient norm 2.7e-7, of LoRA 1.3e-5 in the last two steps.
@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, case in PARTS.items() for stage in case[1]])
def test_parts_are_trained_as_by_the_megatron_engine(name: str, stage: int) -> None:
    model, _, shared, trainable, scales = PARTS[name]
    config = {"kind": "deepspeed", "zero_stage": stage, **shared, **(CUT_SMALL if stage == 3 else {})}
    for found in run_ranks(scaled_curve, 2, config, model, trainable, scales):
        assert_close(found, scaled_reference(name))
    if name == "dp2":
        changed = np.abs(scaled_reference(name) / scaled_reference(name, is_scaled=False) - 1.0)
        assert changed[-1, 0] > 100 * LOSS_TOLERANCE, "the factors change nothing"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_after(folder: str, config: dict[str, Any], before: int, after: int) -> list[tuple[float, float]]:
    """Train, save, go on; what the steps after the checkpoint gave."""
    engine, chunk = build(config, "H", ALL_PARTS, SCALES)
    for number in range(before):
        step(engine, chunk, number)
    save_checkpoint(folder, before, engine, extra={"consumed_samples": 0})
    results = [step(engine, chunk, number) for number in range(before, before + after)]
    return [(result.loss, result.grad_norm) for result in results]


def go_on(folder: str, config: dict[str, Any], before: int, after: int) -> list[tuple[float, float]]:
    engine, chunk = build(config, "H", ALL_PARTS, SCALES)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.zero_()  # what is not loaded shows
    load_checkpoint(folder, engine, with_optimizer=True)
    results = [step(engine, chunk, number) for number in range(before, before + after)]
    return [(result.loss, result.grad_norm) for result in results]


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero_stage": stage, **settings}


BF16 = {"precision": "bf16"}
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, zero(1)),
    "zero2": (2, zero(2)),
    "zero3": (2, zero(3, **CUT_SMALL)),
    "zero1_bf16": (2, zero(1, **BF16)),
    "zero3_bf16": (2, zero(3, **BF16, **CUT_SMALL)),
    "zero3_offloaded": (2, zero(3, offload_optimizer="cpu", offload_param="cpu")),
    "zero2_tp2_sp": (4, zero(2, **TP2_SP)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    world_size, config = RESUMED[name]
    expected = run_ranks(save_after, world_size, str(tmp_path), config, 2, 2)
    assert run_ranks(go_on, world_size, str(tmp_path), config, 2, 2) == expected
    verify(tmp_path / "iter_0000002")


@pytest.mark.parametrize(
    ("saved", "resumed", "world_size"),
    [
        (zero(3, **CUT_SMALL), {}, 2),
        ({}, zero(3, **CUT_SMALL), 2),
        (zero(2), {}, 1),
        ({}, zero(1), 4),
        (zero(1), zero(3), 1),
        (zero(3), TP2_SP, 2),
    ],
    ids=["zero3_megatron", "megatron_zero3", "zero2_megatron_alone", "megatron_zero1_dp4", "zero1_zero3", "zero3_tp2"],
)
def test_engines_take_up_each_others_runs(
    saved: dict[str, Any], resumed: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    [expected, *_] = run_ranks(save_after, 2, str(tmp_path), saved, 2, 2)
    for found in run_ranks(go_on, world_size, str(tmp_path), resumed, 2, 2):
        assert_close(found, np.array(expected))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(CheckpointWeights(folder, with_optimizer=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_is_the_megatron_engines(stage: int, tmp_path: Path) -> None:
    run_ranks(save_after, 2, str(tmp_path / "zero"), zero(stage), 1, 0)
    run_ranks(save_after, 2, str(tmp_path / "megatron"), {}, 1, 0)
    found, expected = (tensors_of(tmp_path / name / "iter_0000001") for name in ("zero", "megatron"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype), key
        # worst seen: 6.0e-8, float32 sums in another order
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=key)


# ---- steps that do not count -----------------------------------------------------------------------------------------


def skipped(config: dict[str, Any], model: str = "D") -> list[Any]:
    """A step, one with a loss that is refused, one with gradients that are not finite, one without a trained token;
    then the second step proper."""
    engine, chunk = build(config, model, ALL_PARTS)
    results = [step(engine, chunk, 0), step(engine, chunk, 5, accept=lambda loss: False)]
    batches = mixed_batches(1, chunk.route)
    batches = batches[engine.data_parallel_rank :: engine.data_parallel_size]
    handle = chunk.connector.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    results.append(engine.train_step(batches))
    handle.remove()
    masks = [batch.loss_mask.clone() for batch in batches]
    for batch in batches:
        batch.loss_mask.zero_()
    results.append(engine.train_step(batches))
    for batch, mask in zip(batches, masks, strict=True):
        batch.loss_mask.copy_(mask)
    results.append(engine.train_step(batches))
    return [(result.skip_reason, result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("config", [zero(1), zero(1, **BF16), zero(2, offload_optimizer="cpu"), zero(3, **CUT_SMALL)])
def test_skipped_steps_leave_no_trace(config: dict[str, Any]) -> None:
    [results, _] = run_ranks(skipped, 2, config)
    assert [reason for reason, _, _ in results] == [
        None,
        "loss_spike",
        "grad_not_finite",
        "no_trained_token",
        None,
    ]
    precision = {"precision": config.get("precision", "fp32")}
    expected = np.array(run_ranks(curve, 2, precision, "D", ALL_PARTS, 2)[0])
    assert_close([results[0][1:], results[-1][1:]], expected)
