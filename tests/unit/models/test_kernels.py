"""The hand-written parts against torch's own, values and gradients, and where each is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.models import kernels

# name: S, L, N, H, G, D, how tokens see each other
ATTENTION: dict[str, tuple[int, int, int, int, int, int, str]] = {
    "causal": (24, 24, 3, 4, 4, 16, "causal"),
    "causal_grouped": (24, 24, 3, 4, 2, 16, "causal"),
    "one_key_head": (24, 24, 3, 4, 1, 16, "causal"),
    "tile": (17, 17, 3, 5, 5, 8, "all"),
    "other_keys": (9, 40, 2, 4, 2, 16, "all"),
    "mask_for_each_row": (24, 24, 3, 4, 2, 16, "masks"),
    "mask_for_all_rows": (24, 24, 3, 4, 2, 16, "mask"),
}


def make_inputs(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None, bool]:
    num_queries, num_keys, rows, heads, groups, width, kind = ATTENTION[name]
    generator = torch.Generator().manual_seed(5)
    shapes = ((num_queries, rows, heads, width), *[(num_keys, rows, groups, width)] * 2)
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    mask = None
    if kind.startswith("mask"):
        mask = torch.rand(rows if kind == "masks" else 1, 1, num_queries, num_keys, generator=generator) > 0.6
        mask[..., 0] = False  # every token sees something
    return inputs, mask, kind == "causal"


def torch_attention(inputs: list[Tensor], mask: Tensor | None, is_causal: bool) -> Tensor:
    query, key, value = (states.permute(1, 2, 0, 3) for states in inputs)
    allowed = None if mask is None else ~mask
    attended = F.scaled_dot_product_attention(query, key, value, allowed, is_causal=is_causal, enable_gqa=True)
    return attended.permute(2, 0, 1, 3).flatten(2)


def differences(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float(((a.double() - b.double()).norm() / b.double().norm()).detach()) for a, b in pairs]


def compare_attention(name: str, dtype: torch.dtype) -> list[float]:
    inputs, mask, is_causal = make_inputs(name, dtype)
    scale = inputs[0].shape[-1] ** -0.5
    found = kernels.short_attention(*inputs, mask=mask, is_causal=is_causal, scale=scale)
    exact = [states.detach().double().requires_grad_() for states in inputs]
    expected = torch_attention(exact, mask, is_causal)
    assert found.shape == expected.shape
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    found_grads = torch.autograd.grad(found, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    return differences([found, *found_grads], [expected, *expected_grads])


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_and_its_gradients_equal_torch(name: str) -> None:
    # worst seen: 4e-16
    assert max(compare_attention(name, torch.float64)) < 1e-14


@pytest.mark.parametrize("name", ATTENTION)
def test_bfloat16_attention_rounds_as_much_as_its_type(name: str) -> None:
    # worst seen: 4.4e-3; torch's own differ by up to 5e-3 from the exact values (one digit of bfloat16 is 4e-3)
    assert max(compare_attention(name, torch.bfloat16)) < 8e-3


def test_attention_cut_into_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare_attention("mask_for_each_row", torch.float64)
    monkeypatch.setattr(kernels, "_MOST_SCORES", 24 * 24 * 2)
    query = torch.empty(3, 2, 48, 16)
    assert kernels._parts(query, query[:, :, :24]) == [(mask, slice(i, i + 1)) for mask in range(3) for i in range(2)]
    assert max(compare_attention("mask_for_each_row", torch.float64)) < 1e-14
    assert max(whole) < 1e-14


@pytest.mark.parametrize(
    ("dtype", "length", "expected"),
    [
        (torch.bfloat16, 1024, True),
        (torch.bfloat16, 1025, False),  # torch skips what lies above the diagonal, and wins
        (torch.float32, 64, False),
    ],
)
def test_short_attention_is_for_short_bfloat16(dtype: torch.dtype, length: int, expected: bool) -> None:
    states = torch.empty(length, 1, 1, 2, dtype=dtype)
    assert kernels.takes_short_attention(states, states) is expected


# Largest difference seen, relative to the largest value: float32 3e-7, bfloat16 4e-3 (a digit of bfloat16).
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_and_its_gradients_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(7)
    states = (3.0 * torch.randn(7, 5, 48, generator=generator)).to(dtype).requires_grad_()
    weight = (1.0 + 0.3 * torch.randn(48, generator=generator)).to(dtype).requires_grad_()
    upstream = torch.randn(7, 5, 48, generator=generator).to(dtype)
    found = kernels.rms_norm(states, weight, 1e-2)  # an epsilon that matters
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    expected = F.rms_norm(exact[0], (48,), exact[1], 1e-2)
    found_grads = torch.autograd.grad(found, (states, weight), upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    for a, b in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert a.dtype == dtype
        assert float(((a.double() - b).abs().max() / b.abs().max()).detach()) < tolerance
