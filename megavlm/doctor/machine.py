"""What is installed. Nothing optional is imported to find out."""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megavlm.engines.fp8 import version_numbers

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_COMPILERS = ("cc", "gcc", "clang")
_SCHEDULERS = ("sbatch", "srun")
KERNELS = ("fused_weight_gradient_mlp_cuda", "amp_C")
"""Modules that Apex builds only when it is asked to."""
BUILD_NEEDS = {
    "a C++ compiler": "g++",
    "libaio": "libaio-dev",
    "Python.h": "python3-dev",
    "ninja": "ninja-build",
}
"""What DeepSpeed compiles its async_io operator with -> the Debian package that has it."""
_USES_LIBAIO = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"


@dataclass(frozen=True)
class Machine:
    """This machine, for one process."""

    versions: Mapping[str, str]
    """Distribution -> version, of those that are installed."""
    kernels: frozenset[str]
    """Of :data:`KERNELS` those that can be imported."""
    gpu: str | None
    """Name of the first GPU that torch sees."""
    num_gpus: int
    capability: tuple[int, int]
    """Compute capability of the first GPU; (0, 0) without one."""
    cuda: tuple[int, int]
    """CUDA that torch was built with; (0, 0) without."""
    nccl: str | None
    """Version inside torch."""
    has_driver: bool
    """Whether the kernel has NVIDIA's driver, whatever torch sees."""
    compiler: str | None
    """C compiler, which Triton wants when kernels first run."""
    scheduler: str | None
    """Command of SLURM."""
    build_lacks: tuple[str, ...] = ()
    """Keys of :data:`BUILD_NEEDS` that are not here."""

    @property
    def has_gpu(self) -> bool:
        """Whether torch sees a GPU."""
        return self.num_gpus > 0

    @property
    def can_compile(self) -> bool:
        """Whether torch can compile kernels for the GPU."""
        return self.has_gpu and "triton" in self.versions and self.compiler is not None


def look_at_machine(distributions: Iterable[str]) -> Machine:
    """Look at this machine.

    Args:
        distributions: names to look for.
    """
    versions = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    has_gpu = torch.cuda.is_available()
    return Machine(
        versions=versions,
        kernels=frozenset(name for name in KERNELS if importlib.util.find_spec(name) is not None),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        num_gpus=torch.cuda.device_count() if has_gpu else 0,
        capability=torch.cuda.get_device_capability() if has_gpu else (0, 0),
        cuda=version_numbers(torch.version.cuda or ""),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if has_gpu else None,  # type: ignore[no-untyped-call]
        has_driver=_NVIDIA_DRIVER.exists(),
        compiler=_first(_COMPILERS),
        scheduler=_first(_SCHEDULERS),
        build_lacks=tuple(_build_lacks()),
    )


def _build_lacks() -> Iterator[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))  # torch's choice, which DeepSpeed compiles with
    has_compiler = shutil.which(compiler[0]) is not None
    if not has_compiler:
        yield "a C++ compiler"
    if not (_links_libaio(compiler) if has_compiler else Path("/usr/include/libaio.h").exists()):
        yield "libaio"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        yield "Python.h"
    if shutil.which("ninja") is None:
        yield "ninja"


def _links_libaio(compiler: list[str]) -> bool:
    """Whether a program that uses libaio is compiled here, wherever its header and library lie."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-", "-laio", "-o", f"{folder}/program"]
        return subprocess.run(command, input=_USES_LIBAIO, text=True, capture_output=True).returncode == 0


def _first(commands: Iterable[str]) -> str | None:
    return next((command for command in commands if shutil.which(command)), None)
