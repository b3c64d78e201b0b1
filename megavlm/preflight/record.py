"""What a run is, written down before it starts: recipe, code, packages, environment, command.

With these files a job can be replayed: the same code (commit and patch), the same recipe, the same packages.
"""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import megavlm
from megavlm.config import save_recipe
from megavlm.preflight.fact import source_digest
from megavlm.recipe import Recipe

_VARIABLES = (
    *("CONTAINER_COMMAND", "CONTAINER_IMAGE", "CONTAINER_MOUNTS", "RANKS_PER_NODE", "MEGAVLM_", "SBATCH_", "SLURM"),
    *("CUDA_", "GLOO_", "MASTER_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH", "UCX_"),
    *("HF_", "LD_", "MKL_", "OMP_", "PATH", "PYTHON", "VIRTUAL_ENV"),
)
"""How the names of variables begin that bear on a run."""
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")


def record_folder(recipe: Recipe, environment: Mapping[str, str]) -> Path:
    """Where the record of a job belongs: in the run folder, by job and attempt, or by time outside SLURM."""
    job = environment.get("SLURM_JOB_ID") or datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return recipe.checkpoint.save.absolute() / "jobs" / job / f"attempt_{attempt}"


def write_record(recipe: Recipe, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    """Write the record of a run that is about to start.

    Args:
        recipe: resolved.
        arguments: of the command line, after ``megavlm``.
        environment: of this process; what may be a secret is left out.
        folder: where to; made if it is not there.

    Raises:
        ValueError: the folder cannot be written to.
    """
    code = Path(megavlm.__file__).parent.parent
    texts = {
        "command.txt": f"cd {shlex.quote(os.getcwd())}\nmegavlm {shlex.join(arguments)}\n",
        "code.txt": _describe_code(code),
        "code.patch": _git(code, "diff", "--binary", "HEAD") or "",
        "packages.txt": "".join(f"{line}\n" for line in _packages()),
        "environment.txt": "".join(f"{line}\n" for line in _visible(environment)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, folder / "recipe.yaml")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{folder}: the record cannot be written there ({error.strerror}). Make room, or choose another "
            "checkpoint.save."
        ) from None


def shell_variables(recipe: Recipe, folder: Path) -> str:
    """What a job script has to know of a run, as lines that a shell can evaluate."""
    values = {
        "RUN_FOLDER": str(recipe.checkpoint.save.absolute()),
        "TRAIN_ITERS": str(recipe.training.train_iters),
        "RECORD": str(folder),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _describe_code(folder: Path) -> str:
    commit = _git(folder, "rev-parse", "HEAD")
    lines = [
        f"megavlm {megavlm.__version__}, source {source_digest()}, in {folder}",
        f"python {platform.python_version()} on {platform.platform()}",
        f"commit: {commit.strip() if commit else 'unknown: not a git checkout, or git refuses to read it'}",
    ]
    if commit:
        lines += ["", "changed since the commit:", _git(folder, "diff", "--stat", "HEAD") or "nothing"]
        lines += ["not tracked:", _git(folder, "ls-files", "--others", "--exclude-standard") or "nothing"]
    return "\n".join(lines).rstrip() + "\n"


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace", timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _packages() -> list[str]:
    """Installed packages as ``name==version``, the first of each name on the path."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(distribution.metadata["Name"], distribution.version)
    return sorted((f"{name}=={version}" for name, version in found.items()), key=str.lower)


def _visible(environment: Mapping[str, str]) -> list[str]:
    """Variables that bear on a run, as a shell would read them, without anything that may be a secret."""
    names = [name for name in environment if name.startswith(_VARIABLES)]
    return [
        f"{name}={shlex.quote(environment[name])}"
        for name in sorted(names)
        if not any(word in name.upper() for word in _SECRETS)
    ]
