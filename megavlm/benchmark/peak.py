"""What a device could compute at best: from its maker's data sheet, or, where none is known, what it is seen to do."""

import re
import time
from dataclasses import dataclass

import torch

_TERA = 1e12
_DATA_SHEETS: list[tuple[str, dict[str, float]]] = [
    # dense, without sparsity; fp32 without TF32. From the makers' data sheets, where many numbers are with sparsity.
    (r"B200\b", {"fp32": 75, "bf16": 2250, "fp8": 4500}),
    (r"H200 NVL\b", {"fp32": 60, "bf16": 835.5, "fp8": 1671}),
    (r"H200\b", {"fp32": 67, "bf16": 989.5, "fp8": 1979}),
    (r"H100 NVL\b", {"fp32": 60, "bf16": 835.5, "fp8": 1671}),
    (r"H100 PCIe\b", {"fp32": 51, "bf16": 756.5, "fp8": 1513}),
    (r"H100 80GB HBM3\b", {"fp32": 67, "bf16": 989.5, "fp8": 1979}),
    (r"H20\b", {"fp32": 44, "bf16": 148, "fp8": 296}),
    (r"[AH]800\b", {}),  # several variants share the name
    (r"A100\b", {"fp32": 19.5, "bf16": 312}),
    (r"A40\b", {"fp32": 37.4, "bf16": 149.7}),
    (r"A10\b", {"fp32": 31.2, "bf16": 125}),
    (r"L40S\b", {"fp32": 91.6, "bf16": 362, "fp8": 733}),
    (r"L40\b", {"fp32": 90.5, "bf16": 181, "fp8": 362}),
    (r"L4\b", {"fp32": 30.3, "bf16": 121, "fp8": 242.5}),
    (r"MI300X\b", {"fp32": 163.4, "bf16": 1307.4, "fp8": 2614.9}),
]
"""Pattern of the name that torch gives a device -> TFLOP/s of matrix products by ``engine.precision``; the first that
is found holds."""
_SIDES = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """Floating-point operations that one device does at best."""

    flops_per_second: float
    source: str
    """Where the number is from."""


def find_peak(device: torch.device, precision: str) -> Peak:
    """Return the peak of this rank's device. All ranks call it at the same time, because they may share a machine.

    Args:
        device: of this rank.
        precision: of a recipe's engine: ``fp32``, ``bf16`` or ``fp8``.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        is_plain = precision != "fp32" or torch.get_float32_matmul_precision() == "highest"  # else TF32
        known = data_sheet_peak(name, precision) if is_plain else None
        if known is not None:
            return Peak(known, f"{name}, data sheet, dense {precision}")
    return _measure(device, precision)


def data_sheet_peak(name: str, precision: str) -> float | None:
    """Operations per second by the data sheet of the device of a name; None: not known."""
    for pattern, teras in _DATA_SHEETS:
        if re.search(rf"\b{pattern}", name):
            return teras[precision] * _TERA if precision in teras else None
    return None


def _measure(device: torch.device, precision: str) -> Peak:
    """The rate of a large square matrix product."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    side = _SIDES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = []
    for _ in range(_REPEATS):
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    source = f"measured: best of {_REPEATS} products of {side} x {side} {str(dtype).removeprefix('torch.')}{threads}"
    return Peak(2 * side**3 / min(seconds), source)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
