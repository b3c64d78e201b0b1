"""The peak of a device: from a data sheet or measured, and said which."""

import pytest
import torch

from megavlm.benchmark import peak as peak_module
from megavlm.benchmark.peak import data_sheet_peak, find_peak

NAMES = {
    "NVIDIA H100 80GB HBM3": (989.5e12, 1979e12),
    "NVIDIA H100 PCIe": (756.5e12, 1513e12),
    "NVIDIA H100 NVL": (835.5e12, 1671e12),
    "NVIDIA H200": (989.5e12, 1979e12),
    "NVIDIA A100-SXM4-80GB": (312e12, None),
    "NVIDIA A10": (125e12, None),
    "NVIDIA L40S": (362e12, 733e12),
    "NVIDIA L4": (121e12, 242.5e12),
    "AMD Instinct MI300X": (1307.4e12, 2614.9e12),
    "NVIDIA A10G": (None, None),  # another device than an A10
    "NVIDIA GB200": (None, None),
    "NVIDIA H800": (None, None),
    "Tesla V100-SXM2-32GB": (None, None),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_data_sheet_of_a_name(name: str) -> None:
    assert (data_sheet_peak(name, "bf16"), data_sheet_peak(name, "fp8")) == NAMES[name]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_cpu_is_measured(precision: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peak_module._SIDES, "cpu", 128)
    sides = []
    product = torch.mm
    monkeypatch.setattr(peak_module.torch, "mm", lambda a, b: sides.append((a.shape, a.dtype)) or product(a, b))
    peak = find_peak(torch.device("cpu"), precision)
    assert peak.flops_per_second > 1e7
    assert peak.source == f"measured: best of 5 products of 128 x 128 {dtype}, {torch.get_num_threads()} thread(s)"
    assert sides == [((128, 128), getattr(torch, dtype))] * 6
