"""Which packages matter, in which versions, what is lost without them, and how to get them."""

from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet

from megavlm.doctor.machine import BUILD_NEEDS, Machine

_GPU_INSTALL = "pip install --no-build-isolation -r requirements-gpu.txt"
_CORE_INSTALL = "pip install -c constraints.txt -r requirements.txt"


@dataclass(frozen=True)
class Package:
    """One package and what we know of its versions."""

    name: str
    """Distribution."""
    works: str
    """Versions that can work; outside, it is a misfit."""
    tested: str
    """Versions that the tests ran with; empty: none ran with it."""
    cost: str
    """What is lost without it."""
    mend: str
    """Command."""
    is_needed: bool = False
    only_gpu: bool = False
    """Whether its absence means nothing on a machine without a GPU."""


# The ranges are those of requirements*.txt; a test compares them.
PACKAGES: tuple[Package, ...] = (
    Package("torch", ">=2.11,<2.14", ">=2.13,<2.14", "nothing runs", _CORE_INSTALL, is_needed=True),
    Package("megatron-core", "==0.16.1", "==0.16.1", "nothing runs", _CORE_INSTALL, is_needed=True),
    Package("transformers", ">=5.20,<6", ">=5.20,<6", "no tokenizers of Hugging Face", _CORE_INSTALL, is_needed=True),
    Package(
        "triton",
        ">=3.3",
        "",
        "cross-attention on a GPU fails, packed rows attend under a full mask",
        "pip install triton",
        only_gpu=True,
    ),
    Package(
        "transformer-engine",
        ">=2.9,<2.12",
        "",
        "no fused norm and linear, no fused rotary positions, no FP8 (engine.backend=transformer_engine)",
        _GPU_INSTALL,
        only_gpu=True,
    ),
    Package("transformer-engine-torch", ">=2.9,<2.12", "", "as transformer-engine", _GPU_INSTALL, only_gpu=True),
    Package(
        "flash-attn",
        ">=2.7.3,<=2.8.3",
        "",
        "Transformer Engine attends through cuDNN, torch through its own kernels",
        "pip install --no-build-isolation 'flash-attn>=2.7.3,<=2.8.3'",
        only_gpu=True,
    ),
    Package(
        "apex",
        ">=0.1",
        "",
        "gradients of weights are added up by a kernel of their own",
        "from source: docs/GPU.md",
        only_gpu=True,
    ),
    Package(
        "deepspeed",
        ">=0.19.8,<0.20",
        ">=0.19.8,<0.20",
        "no ZeRO (engine.kind=deepspeed)",
        "DS_BUILD_OPS=0 pip install -c constraints.txt -r requirements-deepspeed.txt",
    ),
    Package(
        "nv-grouped-gemm",
        ">=0",
        "",
        "nothing: torch has a grouped product of its own",
        "",
        only_gpu=True,
    ),
)

ASYNC_IO = "deepspeed's async_io"
"""Name of the finding that is no package."""

Status = Literal["ok", "untested", "missing", "misfit"]


@dataclass(frozen=True)
class Finding:
    """What is to be said of one package."""

    name: str
    version: str | None
    status: Status
    note: str
    """What is wrong, or lost; empty where all is well."""
    mend: str


def find_packages(machine: Machine) -> list[Finding]:
    """Say of each package whether it is there and fits the others."""
    findings = []
    for package in PACKAGES:
        version = machine.versions.get(package.name)
        if version is None:
            is_lost = package.is_needed or machine.has_gpu or not package.only_gpu
            note = package.cost if is_lost else "of no use without a GPU"
            status: Status = "misfit" if package.is_needed else "missing"
            findings.append(Finding(package.name, None, status, note, package.mend if is_lost else ""))
            continue
        status, note = _judge(package, version)
        if problem := _PARTNERS.get(package.name, _no_partner)(machine):
            status, note = "misfit", problem
        findings.append(Finding(package.name, version, status, note, package.mend if status == "misfit" else ""))
    return [*findings, _find_async_io(machine)]


def _find_async_io(machine: Machine) -> Finding:
    """DeepSpeed's operator for NVMe, which is compiled where it is used."""
    if not machine.build_lacks:
        return Finding(ASYNC_IO, None, "ok", "compiled when engine.nvme_path is first used", "")
    lacks = f"no offload to NVMe (engine.nvme_path): {', '.join(machine.build_lacks)} not found"
    packages = " ".join(BUILD_NEEDS[name] for name in machine.build_lacks)
    return Finding(ASYNC_IO, None, "missing", lacks, f"apt-get install {packages}")


def _judge(package: Package, version: str) -> tuple[Status, str]:
    if not SpecifierSet(package.works, prereleases=True).contains(version):
        return "misfit", f"{package.works} is needed"
    if not package.tested:
        return "untested", "no test has run with it"
    if not SpecifierSet(package.tested, prereleases=True).contains(version):
        return "untested", f"tests run with {package.tested}"
    return "ok", ""


def _no_partner(machine: Machine) -> str:
    return ""


def _torch_misfit(machine: Machine) -> str:
    if machine.has_driver and machine.cuda == (0, 0):
        return "it is built for the CPU, and there is an NVIDIA driver"
    return ""


def _triton_misfit(machine: Machine) -> str:
    if machine.has_gpu and machine.compiler is None:
        return "it finds no C compiler (cc, gcc or clang), which it calls when a kernel first runs"
    return ""


def _transformer_engine_misfit(machine: Machine) -> str:
    own, binding = machine.versions["transformer-engine"], machine.versions.get("transformer-engine-torch")
    if not any(name in machine.versions for name in (*CORES, "transformer-engine-torch")):
        return ""  # built from source, in one piece
    if binding is None:
        return "transformer-engine-torch, which binds it to torch, is not installed"
    if binding.split("+")[0] != own.split("+")[0]:
        return f"transformer-engine-torch is {binding}"
    core = f"transformer-engine-cu{machine.cuda[0]}"
    others = [name for name in CORES if name in machine.versions and name != core]
    if machine.cuda != (0, 0) and core not in machine.versions and others:
        return f"{others[0]} is installed, and torch is built with CUDA {machine.cuda[0]}.{machine.cuda[1]}"
    return ""


CORES = ("transformer-engine-cu12", "transformer-engine-cu13")
"""Transformer Engine's kernels, for one CUDA each."""

_PARTNERS = {
    "torch": _torch_misfit,
    "triton": _triton_misfit,
    "transformer-engine": _transformer_engine_misfit,
}

DISTRIBUTIONS = (*(package.name for package in PACKAGES), *CORES)
"""What to look for."""
