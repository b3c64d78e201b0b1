"""Scales of FP8 by Transformer Engine's rules, and rounding to FP8 and back, for the emulation on any machine.

The rules are those of Transformer Engine 2.x as its sources have them, file by file where they are used below (paths
under ``transformer_engine/``). A tensor is multiplied by its scale, cut off at the largest number of the format,
rounded to nearest even and divided by the scale again: float32 numbers that FP8 can hold, so that a product of two of
them in float32 is what a tensor core computes, up to the order of its sums.

Shape letters: R rows, C columns of an operand as a matrix. A product contracts columns of both operands or rows of
both; blocks lie along what it contracts.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LARGEST = {E4M3: 448.0, E5M2: 57344.0}
_FLOAT32_MAX = torch.finfo(torch.float32).max
_EXPONENT_AND_SIGN = -(1 << 23)  # the bits of a float32 that are not its mantissa
_E8M0_BIAS, _E8M0_LARGEST = 127, 254


@dataclass(frozen=True)
class Fp8Rules:
    """How a recipe scales. Names and words are those of megatron-core's ``fp8_`` settings."""

    recipe: str
    """``delayed``, ``tensorwise``, ``blockwise`` or ``mxfp8``."""
    format: str
    """``hybrid``: gradients are E5M2, all else E4M3. ``e4m3``: all."""
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"

    @classmethod
    def of(cls, megatron_settings: Mapping[str, Any]) -> "Fp8Rules":
        """Read them out of TransformerConfig arguments."""
        return cls(
            recipe=megatron_settings["fp8_recipe"],
            format=megatron_settings["fp8"],
            margin=megatron_settings["fp8_margin"],
            amax_history_len=megatron_settings["fp8_amax_history_len"],
            amax_compute_algo=megatron_settings["fp8_amax_compute_algo"],
        )


class Quantizer(Protocol):
    """Rounds one operand of a linear layer's products (``[R, C]`` float32) to FP8 and back."""

    def quantize(self, values: Tensor, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None]:
        """Round it for a product that contracts its columns (scaled along rows), and for one that contracts its rows.

        Args:
            values: ``[R, C]`` float32.
            rows, columns: which of the two are wanted; None is returned for the other.
        """


def quantizers_of(rules: Fp8Rules) -> tuple[Quantizer, Quantizer, Quantizer]:
    """Make those of one layer's input, weight and gradient of the output."""
    backward = E5M2 if rules.format == "hybrid" else E4M3
    if rules.recipe == "delayed":
        return DelayedScaling(E4M3, rules), DelayedScaling(E4M3, rules), DelayedScaling(backward, rules)
    if rules.recipe == "tensorwise":
        return CurrentScaling(E4M3), CurrentScaling(E4M3), CurrentScaling(backward)
    if rules.recipe == "blockwise":
        return BlockScaling(E4M3), BlockScaling(E4M3, is_square=True), BlockScaling(backward)
    assert rules.recipe == "mxfp8", rules.recipe
    return MxScaling(E4M3), MxScaling(E4M3), MxScaling(backward)


# ---- rounding --------------------------------------------------------------------------------------------------------


@functools.cache
def _values_of_codes(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to numbers of an FP8 format: to nearest, ties to even; what is too large becomes the largest.

    As the saturating conversion of the GPU: infinity becomes the largest number too, NaN stays NaN.
    """
    codes = values.clamp(-_LARGEST[dtype], _LARGEST[dtype]).to(dtype)
    # torch's own way back from E4M3 is five times slower than a table
    found = _values_of_codes(dtype, values.device).index_select(0, codes.view(torch.uint8).int().flatten())
    return found.view(values.shape)


def largest_magnitude(values: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Largest absolute value, kept dimensions if there are any; NaN does not count and nothing at all gives 0.

    ``fmaxf`` and ``__hmax`` of ``common/recipe/current_scaling.cu`` pass over NaN.
    """
    if values.numel() == 0:
        return values.new_zeros(())
    magnitudes = values.abs()
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)
    if largest.isnan().any():
        return largest_magnitude(magnitudes.nan_to_num(nan=0.0, posinf=float("inf")), dim)
    return largest


# ---- scales ----------------------------------------------------------------------------------------------------------


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """Scale that brings ``amax`` to the largest number of a format: ``common/recipe/recipe_common.cuh``.

    1 where ``amax`` is 0 or infinite; the largest float32 where the quotient is beyond it. ``power_of_two`` cuts off
    the mantissa, so that the scaled amax is at most one power of two below the largest number.
    """
    scale = (_LARGEST[dtype] / amax).clamp(max=_FLOAT32_MAX)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_AND_SIGN).view(torch.float32)
    return torch.where((amax == 0) | amax.isinf(), torch.ones_like(scale), scale)


def mx_exponent_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Biased E8M0 exponent of a block's inverse scale: ``float_to_e8m0`` of ``common/util/ptx_arch_spec.cuh``.

    ``amax / largest`` rounded up to a power of two, so that nothing is ever cut off. int32.
    """
    quotient = amax * (1.0 / _LARGEST[dtype])
    mantissa, exponent = torch.frexp(quotient)
    rounded_up = exponent - (mantissa == 0.5).to(exponent.dtype)
    biased = (rounded_up + _E8M0_BIAS).clamp(0, _E8M0_LARGEST)
    biased = torch.where(quotient == 0, torch.zeros_like(biased), biased)
    return torch.where(quotient.isinf(), torch.full_like(biased, _E8M0_LARGEST), biased)


class CurrentScaling:
    """One scale for a tensor, from the tensor itself (``Float8CurrentScaling``).

    Transformer Engine takes the largest value over tensor-parallel ranks where it quantises a share of the sequence
    before it is gathered; here the gathered tensor is quantised, which has the same largest value.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def quantize(self, values: Tensor, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None]:
        """Round ``[R, C]``; see :class:`Quantizer`."""
        scale = scale_of(largest_magnitude(values), self.dtype)
        rounded = round_to(values * scale, self.dtype).mul_(scale.reciprocal())
        return rounded if rows else None, rounded if columns else None


class DelayedScaling:
    """One scale for a tensor, from its largest values of steps before (``DelayedScaling``).

    ``common/recipe/delayed_scaling.cu``: the window is of ``amax_history_len`` steps, the scale is the largest number
    of the format / amax / 2 ^ margin, and stays what it was where amax is 0 or not finite. A step in which the tensor
    was not seen does not move the window. It begins with scale 1.

    Transformer Engine moves the window after each micro-batch, here it is moved after each step, by the largest of the
    step's micro-batches: then the history does not depend on how a global batch is cut into micro-batches, and
    recomputation, which sees a tensor twice, changes nothing. With one micro-batch a step both are the same.
    """

    def __init__(self, dtype: torch.dtype, rules: Fp8Rules) -> None:
        self.dtype = dtype
        self.rules = rules
        self.records = True
        """Whether tensors count (in training, not in validation)."""
        self.amax = torch.zeros(())
        """Largest magnitude since the last update; float32."""
        self.scale = torch.ones(())
        self.history = torch.zeros(rules.amax_history_len)
        """Of the steps of the window, newest first; 0 where there was none."""

    def quantize(self, values: Tensor, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None]:
        """Round ``[R, C]``; see :class:`Quantizer`."""
        if self.records:
            self.amax = torch.maximum(self.amax, largest_magnitude(values).cpu())
        rounded = round_to(values * self.scale, self.dtype).mul_(self.scale.reciprocal())
        return rounded if rows else None, rounded if columns else None

    def update(self, amax: Tensor) -> None:
        """Move the window on by one step, and take the scale of the next.

        Args:
            amax: of the step, over all ranks; float32 scalar.
        """
        self.amax = torch.zeros(())
        if amax != 0.0:
            self.history = torch.cat([amax.reshape(1).cpu(), self.history[:-1]])
        chosen = self.history.max() if self.rules.amax_compute_algo == "max" else amax.cpu()
        if chosen > 0.0 and chosen.isfinite():
            largest = _LARGEST[self.dtype] * 2.0**-self.rules.margin
            self.scale = (largest / chosen).clamp(max=_FLOAT32_MAX)

    def state(self) -> Tensor:
        """Scale and history, ``[1 + amax_history_len]`` float32."""
        return torch.cat([self.scale.reshape(1), self.history])

    def restore(self, state: Tensor) -> None:
        """Take back :meth:`state`; of a longer history the newest, and of a shorter one all."""
        self.amax = torch.zeros(())
        self.scale = state[0].clone()
        self.history = torch.zeros(self.rules.amax_history_len)
        kept = state[1 : 1 + len(self.history)]
        self.history[: len(kept)] = kept


class BlockScaling:
    """Powers of two for 128 values along what is contracted, or for 128 x 128 of a weight (``Float8BlockScaling``).

    ``common/transpose/quantize_transpose_vector_blockwise.cu`` and ``..._square_blockwise.cu``; both directions are
    made of the exact values. A last block may be short.
    """

    size = 128

    def __init__(self, dtype: torch.dtype, *, is_square: bool = False) -> None:
        self.dtype = dtype
        self.is_square = is_square

    def quantize(self, values: Tensor, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None]:
        """Round ``[R, C]``; see :class:`Quantizer`."""
        if self.is_square:
            rounded = self._round(values, self.size, self.size)
            return rounded if rows else None, rounded if columns else None
        return (
            self._round(values, 1, self.size) if rows else None,
            self._round(values, self.size, 1) if columns else None,
        )

    def _round(self, values: Tensor, height: int, width: int) -> Tensor:
        """Round in blocks of that many rows and columns."""
        num_rows, num_columns = values.shape
        padded = F.pad(values, (0, -num_columns % width, 0, -num_rows % height))
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        if blocks.numel() == 0:
            return values.clone()
        scale, inverse = self._scales(largest_magnitude(blocks, (1, 3)))
        return round_to(blocks * scale, self.dtype).mul_(inverse).view_as(padded)[:num_rows, :num_columns]

    def _scales(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        """Scale of each block and what undoes it."""
        scale = scale_of(amax, self.dtype, power_of_two=True)
        return scale, scale.reciprocal()


class MxScaling(BlockScaling):
    """E8M0 powers of two for 32 values along what is contracted, of weights too (``MXFP8BlockScaling``).

    ``common/cast/mxfp8/quantize_mxfp8.cuh``.
    """

    size = 32

    def _scales(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        exponent = mx_exponent_of(amax, self.dtype) - _E8M0_BIAS
        one = torch.ones_like(amax)
        return torch.ldexp(one, -exponent), torch.ldexp(one, exponent)
