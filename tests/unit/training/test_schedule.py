"""The learning rate of each step."""

import math
from types import SimpleNamespace

import pytest

from megavlm.recipe import OptimizerConfig
from megavlm.training.schedule import build_schedule, current_lr


def rates(config: OptimizerConfig, train_iters: int, start: int = 0) -> list[float]:
    """Learning rate of each step after ``start``."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    schedule = build_schedule(optimizer, config, train_iters=train_iters, iteration=start)
    found = []
    for _ in range(train_iters - start):
        schedule.step(increment=1)
        found.append(current_lr(optimizer))
    return found


def test_warm_up_and_cosine() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=4)
    found = rates(config, 12)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])  # the first step trains, with a quarter of the peak
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(1, 9)]
    assert found[4:] == pytest.approx(expected)
    assert found[-1] == pytest.approx(0.1)


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=4)
    assert rates(config, 12, start=7) == rates(config, 12)[7:]
    assert rates(config, 12, start=2) == rates(config, 12)[2:]


def test_linear_constant_and_early_end_of_the_decay() -> None:
    assert rates(OptimizerConfig(lr=1.0, lr_decay_style="linear"), 4) == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert rates(OptimizerConfig(lr=1.0, lr_decay_style="constant"), 3) == pytest.approx([1.0, 1.0, 1.0])
    early = rates(OptimizerConfig(lr=1.0, min_lr=0.2, lr_decay_style="linear", lr_decay_iters=2), 4)
    assert early == pytest.approx([0.6, 0.2, 0.2, 0.2])
