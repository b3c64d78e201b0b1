"""Scales and roundings of FP8, worked out by hand and against exact arithmetic."""

import itertools
from fractions import Fraction

import pytest
import torch

from megavlm.models.backend.fp8_scaling import (
    E4M3,
    E5M2,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Fp8Rules,
    MxScaling,
    largest_magnitude,
    mx_exponent_of,
    quantizers_of,
    round_to,
    scale_of,
)

INF, NAN = float("inf"), float("nan")
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "value", "rounded"),
    [
        (E4M3, 17.0, 16.0),  # steps of 2 from 16 on: a tie goes to the even mantissa
        (E4M3, 19.0, 20.0),
        (E4M3, 17.0001, 18.0),
        (E4M3, 448.0, 448.0),
        (E4M3, 1e9, 448.0),
        (E4M3, -INF, -448.0),
        (E4M3, 2.0**-9, 2.0**-9),  # the smallest
        (E4M3, 2.0**-10, 0.0),  # half of it: a tie, to zero
        (E4M3, 1.5 * 2.0**-9, 2.0**-8),  # a tie, to the even one
        (E5M2, 9.0, 8.0),
        (E5M2, 11.0, 12.0),
        (E5M2, 60000.0, 57344.0),
        (E5M2, INF, 57344.0),
        (E5M2, 2.0**-16, 2.0**-16),
        (E5M2, 2.0**-17, 0.0),
    ],
)
def test_rounding_by_hand(dtype: torch.dtype, value: float, rounded: float) -> None:
    assert round_to(tensor(value), dtype).item() == rounded
    assert round_to(tensor(-value), dtype).item() == -rounded


@pytest.mark.parametrize(
    ("dtype", "bias", "mantissa_bits", "top"), [(E4M3, 7, 3, Fraction(448)), (E5M2, 15, 2, Fraction(57344))]
)
def test_rounding_is_to_nearest_even_everywhere(
    dtype: torch.dtype, bias: int, mantissa_bits: int, top: Fraction
) -> None:
    """Against the format as its definition says it, in exact fractions, on and around every middle."""
    grid = sorted(
        {Fraction(m, 2**mantissa_bits) * Fraction(2) ** (1 - bias) for m in range(2**mantissa_bits)}
        | {
            (1 + Fraction(m, 2**mantissa_bits)) * Fraction(2) ** (e - bias)
            for e in range(1, 32)
            for m in range(2**mantissa_bits)
            if (1 + Fraction(m, 2**mantissa_bits)) * Fraction(2) ** (e - bias) <= top
        }
    )
    middles = torch.tensor([float((low + high) / 2) for low, high in itertools.pairwise(grid)])
    around = torch.cat([torch.nextafter(middles, torch.zeros(())), middles, torch.nextafter(middles, tensor(INF))])
    rounded = round_to(around, dtype).reshape(3, -1)
    low, high = torch.tensor([float(x) for x in grid[:-1]]), torch.tensor([float(x) for x in grid[1:]])
    even_is_low = torch.arange(len(low)) % 2 == 0  # zero has an even mantissa, and the next ones alternate
    assert rounded[0].equal(low)
    assert rounded[1].equal(torch.where(even_is_low, low, high))
    assert rounded[2].equal(high)
    assert round_to(tensor(NAN), dtype).isnan().all()


def test_scales_by_hand() -> None:
    amaxes = tensor(448.0, 2.0, 3.0, 0.0, INF, 1e-45)
    assert scale_of(amaxes, E4M3).tolist() == pytest.approx([1.0, 224.0, 448 / 3, 1.0, 1.0, 3.4028234663852886e38])
    assert scale_of(tensor(7.0), E5M2).item() == 8192.0
    # the mantissa is cut off: 224 -> 128, 149.3 -> 128, 448 / 448.1 -> 0.5
    powers = scale_of(torch.cat([amaxes, tensor(448.1)]), E4M3, power_of_two=True)
    assert powers.tolist() == [1.0, 128.0, 128.0, 1.0, 1.0, 2.0**127, 0.5]


def test_e8m0_exponents_by_hand() -> None:
    """amax / 448 rounded up to a power of two, of bias 127."""
    amaxes = tensor(448.0, 448.1, 224.0, 300.0, 1.0, 0.0, 1e-45, INF, 3e38)
    assert mx_exponent_of(amaxes, E4M3).tolist() == [127, 128, 126, 127, 119, 0, 0, 254, 247]
    assert mx_exponent_of(tensor(57344.0, 57345.0), E5M2).tolist() == [127, 128]


def test_largest_magnitude_passes_over_nan() -> None:
    assert largest_magnitude(tensor(1.0, NAN, -3.0)) == 3.0
    assert largest_magnitude(tensor(1.0, NAN, -INF)) == INF
    assert largest_magnitude(tensor(NAN)) == 0.0
    assert largest_magnitude(torch.zeros(0, 4)) == 0.0
    by_row = largest_magnitude(torch.tensor([[NAN, -2.0], [5.0, 1.0]]), (1,))
    assert by_row.tolist() == [[2.0], [5.0]]


def rules(**fields: object) -> Fp8Rules:
    return Fp8Rules(**{"recipe": "delayed", "format": "hybrid", "amax_history_len": 3, **fields})  # type: ignore[arg-type]


def scales_of(scaling: DelayedScaling, *amaxes: float) -> list[float]:
    found = []
    for amax in amaxes:
        scaling.update(torch.tensor(amax))
        found.append(scaling.scale.item())
    return found


def test_delayed_scale_follows_the_window() -> None:
    scaling = DelayedScaling(E4M3, rules())
    assert scaling.scale == 1.0
    # the largest of the last three: 2, 4, 4, 4, then 1
    assert scales_of(scaling, 2.0, 4.0, 1.0, 1.0, 1.0) == [224.0, 112.0, 112.0, 112.0, 448.0]
    # a step in which it was not seen does not move the window, and one that is not finite keeps the scale
    scaling = DelayedScaling(E4M3, rules())
    assert scales_of(scaling, 4.0, 0.0, 0.0, 0.0, 2.0) == [112.0] * 5
    assert scaling.history.tolist() == [2.0, 4.0, 0.0]
    assert scales_of(scaling, INF, 2.0, 2.0, 2.0) == [112.0, 112.0, 112.0, 224.0]
    recent = DelayedScaling(E4M3, rules(amax_compute_algo="most_recent"))
    assert scales_of(recent, 4.0, 0.0, 2.0, INF, 1.0) == [112.0, 112.0, 224.0, 224.0, 448.0]
    assert scales_of(DelayedScaling(E4M3, rules(margin=2)), 4.0) == [28.0]
    assert scales_of(DelayedScaling(E5M2, rules()), 7.0, 1e-45)[0] == 8192.0
    assert scales_of(DelayedScaling(E5M2, rules(amax_history_len=1)), 1e-45) == [3.4028234663852886e38]


def test_delayed_scaling_uses_the_scale_of_before_and_cuts_off() -> None:
    scaling = DelayedScaling(E4M3, rules())
    values = torch.tensor([[3.0, 1000.0], [-0.3, 0.0]])
    rows, columns = scaling.quantize(values, rows=True, columns=True)
    assert rows is not None
    assert rows.tolist() == [[3.0, 448.0], [-0.3125, 0.0]]  # scale 1: 1000 is beyond the format
    assert columns is not None
    assert columns.equal(rows)
    assert scaling.amax == 1000.0
    scaling.quantize(torch.tensor([[2000.0]]), rows=True, columns=False)
    scaling.quantize(torch.tensor([[5.0]]), rows=True, columns=False)
    assert scaling.amax == 2000.0, "the largest of all micro-batches"
    scaling.records = False
    scaling.quantize(torch.tensor([[9000.0]]), rows=True, columns=False)
    assert scaling.amax == 2000.0, "validation is not seen"
    scaling.update(scaling.amax)
    assert scaling.amax == 0.0
    rows, _ = scaling.quantize(values, rows=True, columns=False)
    assert rows is not None
    assert rows[0, 1].item() == pytest.approx(1000.0, rel=2**-4)


def test_state_is_taken_back_by_histories_of_other_lengths() -> None:
    long = DelayedScaling(E4M3, rules(amax_history_len=4))
    scales_of(long, 1.0, 2.0, 3.0)
    for length, history in ((2, [3.0, 2.0]), (4, [3.0, 2.0, 1.0, 0.0]), (6, [3.0, 2.0, 1.0, 0.0, 0.0, 0.0])):
        other = DelayedScaling(E4M3, rules(amax_history_len=length))
        other.restore(long.state())
        assert other.history.tolist() == history
        assert other.scale == long.scale


def test_blocks_have_scales_of_their_own() -> None:
    """Two blocks of 128 along a row: an outlier in one leaves the other alone. By hand: 448 / 1 -> 256."""
    values = torch.full((1, 256), 1.0 / 256 / 1024)
    values[0, 0] = 1.0
    rows, _ = BlockScaling(E4M3).quantize(values, rows=True, columns=False)
    assert rows is not None
    assert rows[0, 0] == 1.0
    assert (rows[0, 1:128] == 0.0).all(), "2 ** -10 after scaling is half of the smallest number: a tie, to zero"
    assert (rows[0, 128:] == values[0, 128:]).all()
    by_tensor, _ = CurrentScaling(E4M3).quantize(values, rows=True, columns=False)
    assert by_tensor is not None
    assert (by_tensor[0, 128:] == by_tensor[0, 1]).all(), "one scale for all"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 130), (128, 256), (200, 31)])
def test_directions_are_made_of_the_exact_values(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[1])
    for scaling in (BlockScaling(E4M3), MxScaling(E4M3), MxScaling(E5M2)):
        rows, columns = scaling.quantize(values, rows=True, columns=True)
        turned, _ = scaling.quantize(values.T.contiguous(), rows=True, columns=False)
        assert rows is not None
        assert columns is not None
        assert turned is not None
        assert columns.equal(turned.T)
        assert rows.shape == values.shape
    square_rows, square_columns = BlockScaling(E4M3, is_square=True).quantize(values, rows=True, columns=True)
    assert square_rows is square_columns


def outlier() -> torch.Tensor:
    values = torch.randn(64, 160, generator=torch.Generator().manual_seed(1))
    values[5, 7] = 1e4
    return values


TENSORS = {
    "normal": torch.randn(64, 160, generator=torch.Generator().manual_seed(0)),
    "outlier": outlier(),
    "tiny": torch.randn(64, 160, generator=torch.Generator().manual_seed(2)) * 1e-30,
    "denormal": torch.full((64, 160), 1e-40),
    "huge": torch.randn(64, 160, generator=torch.Generator().manual_seed(3)) * 1e30,
    "many_sizes": torch.randn(64, 160, generator=torch.Generator().manual_seed(4)) * torch.logspace(-6, 6, 160),
    "zeros": torch.zeros(64, 160),
    "empty": torch.zeros(0, 160),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_error_is_within_the_formats_bound(recipe: str, name: str) -> None:
    """Half a step of the mantissa, or half of the smallest number at the largest inverse scale of the tensor."""
    values = TENSORS[name]
    for quantizer, largest, half_step, smallest in zip(
        quantizers_of(rules(recipe=recipe)), (448, 448, 57344), (2**-4, 2**-4, 2**-3), (2**-9, 2**-9, 2**-16),
        strict=True,
    ):  # fmt: skip
        if isinstance(quantizer, DelayedScaling):  # it has seen the tensor before
            quantizer.quantize(values, rows=True, columns=False)
            quantizer.update(quantizer.amax)
        for rounded in quantizer.quantize(values, rows=True, columns=True):
            assert rounded is not None
            assert rounded.shape == values.shape
            # powers of two leave up to a factor of two of the range unused; float32 stops at 2 ** -149
            bound = half_step * values.abs() + 2 * smallest / 2 * largest_magnitude(values) / largest + 2.0**-126
            assert (rounded - values).abs().le(bound).all()
            assert not rounded.isnan().any()
            if name == "zeros":
                assert (rounded == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_stays_where_it_is(recipe: str) -> None:
    values = torch.ones(4, 160)
    values[0, 0] = NAN
    values[2, 150] = INF
    for quantizer in quantizers_of(rules(recipe=recipe)):
        rounded, _ = quantizer.quantize(values, rows=True, columns=False)
        assert rounded is not None
        assert rounded.isnan().nonzero().tolist() == [[0, 0]], "and spoils no scale"
        if recipe != "mxfp8":  # there the scale is infinite too
            assert rounded[2, 150].item() in (448.0, 57344.0), "the largest number at scale 1"
        assert rounded[1].eq(1.0).all()


def test_formats_of_operands() -> None:
    for recipe in RECIPES:
        for format_, backward in (("hybrid", E5M2), ("e4m3", E4M3)):
            dtypes = [quantizer.dtype for quantizer in quantizers_of(rules(recipe=recipe, format=format_))]  # type: ignore[attr-defined]
            assert dtypes == [E4M3, E4M3, backward]
