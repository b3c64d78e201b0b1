"""The products of an emulating layer and their gradients, against explicit rounding and float64 products."""

from typing import Any

import pytest
import torch

from megavlm.models.backend import BACKENDS, settle_emulation, unemulated_settings
from megavlm.models.backend.fp8_emulation import Fp8Linear, Operands, emulating_backend
from megavlm.models.backend.fp8_scaling import Fp8Rules, quantizers_of

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
SETTINGS: dict[str, Any] = {
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "fp8_margin": 0,
    "fp8_amax_history_len": 4,
    "fp8_amax_compute_algo": "max",
    "first_last_layers_bf16": False,
    "moe_grouped_gemm": True,
    "num_layers": 2,
}


class Plain(torch.nn.Module):
    """What an emulating layer expects behind it: the call that megatron-core's layers make."""

    def __init__(self, input_size: int, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(output_size, input_size, generator=generator).to(dtype))
        self.bias = torch.nn.Parameter(torch.randn(output_size, generator=generator).to(dtype))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self._forward_impl(
            input=states, weight=self.weight, bias=self.bias, sequence_parallel=False, allreduce_dgrad=False
        )

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.nn.functional.linear(input, weight, bias)


def layer(recipe: str, dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, int] = (160, 96), **rules: Any) -> Any:
    fields = {"rules": Fp8Rules(**{"recipe": recipe, "format": "hybrid", "amax_history_len": 4, **rules})}
    return type("Layer", (Fp8Linear, Plain), fields)(*sizes, dtype)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format_", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_rounded_operands(recipe: str, format_: str, dtype: torch.dtype) -> None:
    """Which operand is scaled along which side: output of rows, input's gradient of the weight's columns, weight's
    gradient of columns alone."""
    linear = layer(recipe, dtype, format=format_)
    states = draw(7, 5, 160, seed=2, dtype=dtype).requires_grad_()
    grad = draw(7, 5, 96, seed=3, dtype=dtype)
    # seen once, so that delayed scales are not 1
    by_input, by_weight, by_grad = quantizers_of(linear.rules)
    for operand, values in ((by_input, states), (by_weight, linear.weight), (by_grad, grad)):
        flat = values.detach().float().flatten(0, -2)
        if recipe == "delayed":
            operand.quantize(flat, rows=True, columns=True)
            operand.update(operand.amax)  # type: ignore[attr-defined]
    linear(states).backward(grad)
    if recipe == "delayed":
        linear.update_scales(linear.amaxes())
    states.grad = linear.weight.grad = linear.bias.grad = None
    output = linear(states)
    output.backward(grad)

    def rounded(quantizer: Any, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = quantizer.quantize(values.detach().float().flatten(0, -2), rows=True, columns=True)
        return rows.double(), columns.double()

    x_rows, x_columns = rounded(by_input, states)
    w_rows, w_columns = rounded(by_weight, linear.weight)
    g_rows, g_columns = rounded(by_grad, grad)
    # one rounding of the result: measured 2 ** -9 of the largest in bfloat16, 3.3e-7 in float32
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    for found, wanted in (
        (output.flatten(0, 1), x_rows @ w_rows.T + linear.bias.double()),
        (states.grad.flatten(0, 1), g_rows @ w_columns),
        (linear.weight.grad, g_columns.T @ x_columns),
        (linear.bias.grad, grad.double().flatten(0, 1).sum(0)),
    ):
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    # and the rounding is there: the same products of exact operands are further away
    exact = states.detach().double().flatten(0, 1) @ linear.weight.detach().double().T + linear.bias.double()
    assert (output.flatten(0, 1).double() - exact).abs().max() > 4 * tolerance * exact.abs().max()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("input_trains", "weight_trains"), [(True, False), (False, True), (False, False)])
def test_frozen_sides_cost_no_product(recipe: str, input_trains: bool, weight_trains: bool) -> None:
    linear = layer(recipe)
    linear.weight.requires_grad_(weight_trains)
    asked: list[tuple[str, bool, bool]] = []

    class Watched:
        def __init__(self, name: str, quantizer: Any) -> None:
            self.name, self.inner = name, quantizer

        def quantize(self, values: torch.Tensor, *, rows: bool, columns: bool) -> Any:
            asked.append((self.name, rows, columns))
            return self.inner.quantize(values, rows=rows, columns=columns)

    linear.operands = Operands(
        *(Watched(name, each) for name, each in zip("xwg", quantizers_of(linear.rules), strict=True))
    )
    states = draw(32, 160, seed=2).requires_grad_(input_trains)
    linear(states).float().sum().backward()
    assert asked[:2] == [("x", True, weight_trains), ("w", True, input_trains)]
    # the bias trains in any case, and its gradient is of the gradient as it came
    assert asked[2:] == ([("g", input_trains, weight_trains)] if input_trains or weight_trains else [])
    assert linear.bias.grad.eq(32.0).all()
    asked.clear()
    assert (states.grad is not None) == input_trains
    assert (linear.weight.grad is not None) == weight_trains
    with torch.no_grad():
        linear(states)
    assert asked == [("x", True, False), ("w", True, False)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_vector_is_no_error(recipe: str) -> None:
    """An expert that gets no token."""
    linear = layer(recipe)
    states = torch.zeros(0, 160, dtype=torch.bfloat16, requires_grad=True)
    linear(states).sum().backward()
    assert linear.weight.grad.eq(0).all()
    assert states.grad is not None
    assert states.grad.shape == (0, 160)
    if recipe == "delayed":
        before = [scaling.scale.item() for scaling in linear.operands.delayed]
        linear.update_scales(linear.amaxes())
        after = [scaling.scale.item() for scaling in linear.operands.delayed]
        assert (before, after[0], after[2]) == ([1.0] * 3, 1.0, 1.0)
        assert after[1] == pytest.approx(448 / linear.weight.abs().max().item())


def test_recomputation_and_validation_leave_no_trace() -> None:
    def train(recomputes: bool, validates: bool) -> tuple[torch.Tensor, torch.Tensor]:
        linear = layer("delayed")
        for step in range(3):
            states = draw(32, 160, seed=step).requires_grad_()
            if recomputes:  # as megatron-core does it: once without a graph, and again in the backward pass
                with torch.no_grad():
                    linear(states)
            linear(states).backward(draw(32, 96, seed=10 + step))
            if validates:
                linear.eval()
                with torch.no_grad():
                    linear(1000.0 * states)
                linear.train()
            linear.update_scales(linear.amaxes())
        return linear.get_extra_state(), linear.weight.grad

    state, weight_grad = train(recomputes=False, validates=False)
    assert state.shape == (3, 5)
    assert (state[:, 1:4] > 0).all(), "three steps of history"
    for recomputes, validates in ((True, False), (False, True)):
        other_state, other_grad = train(recomputes, validates)
        assert other_state.equal(state)
        assert other_grad.equal(weight_grad)


def test_state_of_another_backend_is_ignored() -> None:
    linear = layer("delayed")
    linear.set_extra_state(None)
    assert linear.get_extra_state()[:, 0].tolist() == [1.0, 1.0, 1.0]
    with_history = torch.arange(15.0).view(3, 5)
    linear.set_extra_state(with_history)
    assert linear.get_extra_state().equal(with_history)
    other = layer("mxfp8")
    other.set_extra_state(with_history)
    assert other.get_extra_state() is None
    assert other.amaxes().shape == (0,)


def test_switched_off_it_is_the_layer_behind() -> None:
    linear, states = layer("tensorwise"), draw(3, 160, seed=0)
    exact = torch.nn.functional.linear(states, linear.weight, linear.bias)
    assert not linear(states).equal(exact)
    linear.switch_off()
    assert linear(states).equal(exact)
    assert linear.get_extra_state() is None


def test_settings_without_fp8_are_left_to_megatron_core() -> None:
    plain = unemulated_settings({**SETTINGS, "first_last_layers_bf16": True}, has_experts=False)
    assert (plain["fp8"], plain["first_last_layers_bf16"], plain["moe_grouped_gemm"]) == (None, False, True)
    assert unemulated_settings(SETTINGS, has_experts=True)["moe_grouped_gemm"] is False
    backend = emulating_backend(SETTINGS)
    assert issubclass(backend.column_parallel_linear, Fp8Linear)
    assert not issubclass(backend.unquantized.column_parallel_linear, Fp8Linear)
    assert backend.column_parallel_linear.rules == Fp8Rules("tensorwise", "hybrid", 0, 4, "max")
    assert BACKENDS["fp8_emulation"].column_parallel_linear is BACKENDS["torch"].column_parallel_linear


def test_a_part_without_such_layers_is_refused() -> None:
    parts = {"language": torch.nn.Sequential(layer("mxfp8")), "connector": torch.nn.Sequential(torch.nn.Linear(2, 2))}
    settle_emulation(parts, SETTINGS, ["connector", "vision"])
    with pytest.raises(
        ValueError, match=r"engine\.fp8\.connector='fp8': the layers of model\.connector, Sequential, have no FP8.*bf16"
    ):
        settle_emulation(parts, SETTINGS, ["vision"])
