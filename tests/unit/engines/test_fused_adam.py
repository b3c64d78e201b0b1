"""FusedAdam against torch's own AdamW and Adam."""

import copy
from typing import Any

import pytest
import torch

from megavlm.engines.fused_adam import FusedAdam

NUM_STEPS = 50
# Worst case seen after 50 steps: 1.2e-7 in float32 (another order of operations), 0 in bfloat16 (the same kernel).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.0}


def _groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]

    return [
        {"params": parameters((7, 5), (11,)), "lr": 1e-2, "weight_decay": 0.1},
        {"params": parameters((3, 2, 2)), "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95)},
        {"params": parameters((4,)), "lr": 1e-1, "weight_decay": 0.01},
    ]


def _all(groups: list[dict[str, Any]]) -> list[torch.nn.Parameter]:
    return [param for group in groups for param in group["params"]]


def _set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """New gradients; the second parameter has none in every third step."""
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if index == 1 and step < 3 else gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_equals_torch(dtype: torch.dtype, adam_w_mode: bool) -> None:
    groups = _groups(dtype)
    reference_groups = copy.deepcopy(groups)
    optimizer = FusedAdam(groups, adam_w_mode=adam_w_mode)
    # float32 against the plain python loop; in bfloat16 that one rounds after each operation, so the fused one
    settings = {"fused": True} if dtype == torch.bfloat16 else {"foreach": False}
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(reference_groups, **settings)
    for step in range(NUM_STEPS):
        for params in (_all(groups), _all(reference_groups)):
            _set_gradients(params, step + 3)
        for group, reference_group in zip(optimizer.param_groups, reference.param_groups, strict=True):
            group["lr"] *= 0.99  # schedules write here
            reference_group["lr"] *= 0.99
        optimizer.step()
        reference.step()
    for param, expected in zip(_all(groups), _all(reference_groups), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=TOLERANCE[dtype])
        assert param.dtype == optimizer.state[param]["exp_avg"].dtype == dtype


def test_step_is_an_int_in_each_group_and_counts_all_steps() -> None:
    groups = _groups(torch.float32)
    optimizer = FusedAdam([*groups, {"params": [torch.nn.Parameter(torch.ones(2))]}])
    for step in range(3):
        _set_gradients(_all(groups), step)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 3, 3]
    assert not any("step" in state for state in optimizer.state.values())


def test_parameters_without_gradient_are_left_alone() -> None:
    with_gradient, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([with_gradient, without], lr=0.1, weight_decay=0.5)
    with_gradient.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(without, torch.ones(2))
    assert not optimizer.state[without]
    assert (with_gradient < 1).all()


def test_one_group_may_mix_dtypes_and_empty_parameters() -> None:
    params = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    params.append(torch.nn.Parameter(torch.ones(0)))
    optimizer = FusedAdam(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), params[1].detach().float(), rtol=0, atol=4e-3)  # bfloat16 of 0.9


def test_state_makes_the_round_trip() -> None:
    groups = _groups(torch.float32)
    other_groups = copy.deepcopy(groups)
    optimizer, other = FusedAdam(groups), FusedAdam(other_groups)
    for step in range(3, 6):
        _set_gradients(_all(groups), step)
        optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, value in zip(_all(other_groups), _all(groups), strict=True):
        param.data.copy_(value)
    for trained, last in ((groups, optimizer), (other_groups, other)):
        _set_gradients(_all(trained), 7)
        last.step()
    assert [group["step"] for group in other.param_groups] == [4, 4, 4]
    for param, value in zip(_all(other_groups), _all(groups), strict=True):
        assert torch.equal(param, value)


def test_closure_is_evaluated_with_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], lr=0.1)

    def closure() -> float:
        loss = (param**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert (param < 1).all()


WRONG = [
    ({"bias_correction": False}, "bias_correction=False: torch's fused Adam always corrects"),
    ({"lr": -1.0}, "lr=-1.0, .* none may be below 0"),
    ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\): both must lie in \[0, 1\)"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_wrong_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], **settings)
