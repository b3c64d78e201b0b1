"""What one rank finds out about itself and its node, without the others."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pydantic
import torch

import megavlm
from megavlm.recipe import Recipe
from megavlm.runtime import current_device

PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "tokenizers", "sentencepiece")
"""Packages that must be of one version on all ranks, besides Python and MegaVLM itself."""


@dataclass
class Facts:
    """What a rank knows about itself. Travels as JSON."""

    rank: int
    local_rank: int
    node: str
    device: str = "unknown"
    """``cpu``, or name and memory of the GPU."""
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of each file that the recipe reads, by its key in the recipe."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """What is wrong: name of the check, text."""

    def to_json(self) -> str:
        """Return the facts as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        """Read the facts of another rank."""
        values = json.loads(text)
        values["problems"] = [(check, problem) for check, problem in values["problems"]]
        return cls(**values)


def node_name() -> str:
    """Name of this node, as SLURM calls it or else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def probe_file(folder: Path, token: str, rank: int) -> Path:
    """The file that a rank leaves in the run folder to show that it can."""
    return folder / f".preflight_{token}_{rank:05d}"


def find_facts(recipe: Recipe, facts: Facts, token: str, begin: Callable[[str], None]) -> None:
    """Run all checks of this rank; a check that fails is written down and the next one begins.

    Args:
        recipe: of the run.
        facts: of this rank; filled in place, so that what was found is kept if a check hangs.
        token: of this preflight; part of the name of the file that is left in the run folder.
        begin: called with the name of each check before it begins.
    """
    checks: dict[str, Callable[[], None]] = {
        "versions": lambda: _find_versions(facts),
        "device": lambda: _check_device(facts),
        "run folder": lambda: _write_probe(recipe.checkpoint.save, token, facts.rank),
        "data": lambda: _read_files(recipe, facts),
    }
    for name, check in checks.items():
        begin(name)
        try:
            check()
        except (ValueError, OSError, RuntimeError) as error:
            facts.problems.append((name, str(error).splitlines()[0]))
    begin("")


def find_versions() -> dict[str, str]:
    """Versions of everything that must be the same on all ranks."""
    found = {"python": platform.python_version(), "megavlm": f"{megavlm.__version__} ({source_digest()})"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def source_digest() -> str:
    """Eight characters that change with any line of the package's source."""
    package = Path(megavlm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def input_paths(config: pydantic.BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """All paths that a recipe reads, by their keys: every field that holds a path, ``checkpoint.save`` left out."""
    for name in type(config).model_fields:
        value, key = getattr(config, name), f"{prefix}{name}"
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            item_key = f"{key}[{number}]" if isinstance(value, list) else key
            if isinstance(item, pydantic.BaseModel):
                yield from input_paths(item, f"{item_key}.")
            elif isinstance(item, Path) and key != "checkpoint.save":
                yield item_key, item


def _find_versions(facts: Facts) -> None:
    facts.versions = find_versions()


def _check_device(facts: Facts) -> None:
    """Find this rank's device, and let it multiply something."""
    device = current_device()
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if facts.local_rank >= num_devices:
            raise ValueError(
                f"this node shows {num_devices} GPU(s), and local rank {facts.local_rank} needs one more. Ask for a GPU"
                " for each rank, and let every rank see all GPUs of its node."
            )
        device = torch.device("cuda", facts.local_rank)
        properties = torch.cuda.get_device_properties(device)
        facts.device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        facts.device = "cpu"
    size = 256
    product = torch.ones(size, size, device=device) @ torch.ones(size, size, device=device)
    if not bool((product == size).all()):
        raise ValueError(f"{device} multiplies wrongly: ones give {product.max().item()} instead of {size}.")


def _write_probe(folder: Path, token: str, rank: int) -> None:
    """Write into the run folder.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe_file(folder, token, rank).write_text(str(rank), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"checkpoint.save={folder}: cannot be written to ({error.strerror}).") from None


def _read_files(recipe: Recipe, facts: Facts) -> None:
    """Read a little of every file, and the names of every folder, that the recipe reads.

    Raises:
        ValueError: one cannot be read. Names its key.
    """
    for key, path in input_paths(recipe):
        try:
            if path.is_dir():
                os.listdir(path)
            else:
                with path.open("rb") as file:
                    file.read(4096)
                facts.files[key] = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{key}={path}: cannot be read ({error.strerror}).") from None
