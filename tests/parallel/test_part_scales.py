"""Learning rates and weight decays of parts: what every rank applies, in a whole schedule and after resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny_vlm import TINY, build_tiny, mixed_batches

from megavlm.checkpoint import load_checkpoint, save_checkpoint
from megavlm.engines import MegatronEngine, OptimizerSettings
from megavlm.models.part import parameters_by_name, part_of
from megavlm.recipe import OptimizerConfig
from megavlm.training.freeze import scale_learning_rates, scale_weight_decay
from megavlm.training.schedule import build_schedule, current_lr

SCALES = {"vision": 0.1, "connector": 5.0}
DECAYS = {"vision": 2.0, "connector": 0.0}
TRAINABLE = ("vision", "connector", "language")
LR = 1e-3
PP2 = {"pipeline_model_parallel_size": 2}


def build(
    engine_config: dict[str, Any], scales: dict[str, float], weight_decay: float = 0.0
) -> tuple[MegatronEngine, list[torch.nn.Module]]:
    engine, chunks = build_tiny(engine_config, TRAINABLE, TINY)
    scale_learning_rates(chunks, scales)
    scale_weight_decay(chunks, DECAYS)
    settings = {"lr": LR, "min_lr": LR / 10, "weight_decay": weight_decay}
    engine.build_optimizer(OptimizerSettings(**settings, clip_grad=0.0, adam_eps=1e-12))
    schedule = OptimizerConfig(**settings, lr_decay_style="constant")  # which hands out weight decay
    build_schedule(engine.optimizer, schedule, train_iters=9, iteration=1)
    return engine, chunks


def largest_steps(engine_config: dict[str, Any], scales: dict[str, float]) -> dict[str, float]:
    """On ranks: train once; return the largest change of each part. Adam's first step is the learning rate."""
    engine, chunks = build(engine_config, scales)
    before = {name: weight.detach().clone() for chunk in chunks for name, weight in chunk.named_parameters()}
    engine.train_step(mixed_batches(0)[engine.data_parallel_rank :: engine.data_parallel_size])
    changes: dict[str, float] = {}
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            moved = float((weight.detach() - before[name]).abs().max())
            changes[part_of(name)] = max(moved, changes.get(part_of(name), 0.0))
    return changes


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [(1, {"use_distributed_optimizer": False}), (2, {}), (2, PP2)],
    ids=["one", "dp2 distributed", "pp2"],
)
def test_each_part_moves_by_its_learning_rate(world_size: int, engine: dict[str, Any]) -> None:
    changes: dict[str, float] = {}
    for found in run_ranks(largest_steps, world_size, engine, SCALES):
        changes |= found
    # Worst seen: 6e-5 relative: float32 weights near 1 take the step with 1e-7.
    expected = {part: pytest.approx(LR * SCALES.get(part, 1.0), rel=2e-3) for part in TRAINABLE}
    assert changes == expected


def decays(engine_config: dict[str, Any], weight_decay: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """On ranks: weights before and after one step."""
    engine, chunks = build(engine_config, {}, weight_decay)
    before = {name: weight.detach().clone() for name, weight in parameters_by_name(chunks[0])}
    engine.train_step(mixed_batches(0)[engine.data_parallel_rank :: engine.data_parallel_size])
    return {name: (before[name], weight.detach().clone()) for name, weight in parameters_by_name(chunks[0])}


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [(1, {"use_distributed_optimizer": False}), (2, {}), (2, PP2)],
    ids=["one", "dp2 distributed", "pp2"],
)
def test_each_part_decays_by_its_weight_decay(world_size: int, engine: dict[str, Any]) -> None:
    weight_decay = 50.0
    without, decayed = (run_ranks(decays, world_size, engine, decay) for decay in (0.0, weight_decay))
    for rank in range(world_size):
        for name, (before, after) in decayed[rank].items():
            scale = 0.0 if before.dim() == 1 else DECAYS.get(part_of(name), 1.0)
            expected = without[rank][name][1] - LR * weight_decay * scale * before
            # Worst seen: 6e-8, float32's rounding of weights near 1.
            torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6, msg=name)


def rates(scales: dict[str, float]) -> list[tuple[dict[str, float], float]]:
    """The rates of the parts, and the one that is told, over a schedule of warm-up and cosine."""
    engine, chunks = build({"use_distributed_optimizer": False}, scales)
    names = {id(weight): part_of(name) for chunk in chunks for name, weight in chunk.named_parameters()}
    config = OptimizerConfig(lr=LR, min_lr=LR / 10, lr_warmup_iters=2, lr_decay_iters=6)
    schedule = build_schedule(engine.optimizer, config, train_iters=6, iteration=0)
    found = []
    for _ in range(6):
        schedule.step(increment=1)
        by_part: dict[str, float] = {}
        for group in engine.optimizer.param_groups:
            for weight in group["params"]:
                assert by_part.setdefault(names[id(weight)], group["lr"]) == group["lr"]
        found.append((by_part, current_lr(engine.optimizer)))
    return found


def test_schedule_is_scaled_from_warm_up_to_its_end() -> None:
    [found] = run_ranks(rates, 1, SCALES)
    assert [told for _, told in found][:2] == [pytest.approx(LR / 2), pytest.approx(LR)]
    assert found[-1][1] == pytest.approx(LR / 10)
    for by_part, told in found:
        assert by_part == {part: pytest.approx(told * SCALES.get(part, 1.0)) for part in TRAINABLE}


def test_a_scale_of_every_part_is_told() -> None:
    [found] = run_ranks(rates, 1, {"vision": 2.0, "connector": 2.0, "language": 2.0})
    assert found[1][1] == pytest.approx(2 * LR)


def straight(folder: Path, engine_config: dict[str, Any]) -> list[float]:
    """On ranks: train four steps, save after two. Returns the losses of the last two."""
    engine, _ = build(engine_config, SCALES, weight_decay=10.0)
    losses = []
    for step in range(4):
        if step == 2:
            save_checkpoint(folder, 2, engine, extra={}, files={})
        losses.append(engine.train_step(mixed_batches(step)).loss)
    return losses[2:]


def resumed(folder: Path, engine_config: dict[str, Any]) -> list[float]:
    """On ranks: load, train the last two steps."""
    engine, _ = build(engine_config, SCALES, weight_decay=10.0)
    load_checkpoint(folder / "iter_0000002", engine, with_optimizer=True)
    return [engine.train_step(mixed_batches(step)).loss for step in (2, 3)]


@pytest.mark.parametrize(("world_size", "engine"), [(1, {}), (2, {**PP2, "use_distributed_optimizer": False})])
def test_resumed_run_keeps_the_rates_apart(tmp_path: Path, world_size: int, engine: dict[str, Any]) -> None:
    expected = run_ranks(straight, world_size, tmp_path / "run", engine)
    assert run_ranks(resumed, world_size, tmp_path / "run", engine) == expected
