"""Puts together what the doctor found, and shows it."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megavlm.doctor.machine import Machine, look_at_machine
from megavlm.doctor.package import ASYNC_IO, DISTRIBUTIONS, Finding, find_packages
from megavlm.doctor.padding import Padding, plan_padding
from megavlm.doctor.path import Path, can_fuse, find_paths
from megavlm.engines import DeepSpeedEngineConfig, MegatronEngineConfig
from megavlm.engines.fp8 import recipes_of
from megavlm.recipe import Recipe

_STYLES = {"ok": "green", "untested": "yellow", "missing": "dim", "misfit": "bold red"}


@dataclass(frozen=True)
class Examination:
    """What there is to say of a machine, and of a recipe on it."""

    machine: Machine
    findings: list[Finding]
    fp8_recipes: list[str]
    """That the GPU can do."""
    paths: list[Path]
    padding: Padding | None
    """Of the recipe; None without one."""
    problems: list[str]
    """What would stop a run, or make it wrong. Empty: nothing."""


def examine(recipe: Recipe | None, machine: Machine | None = None) -> Examination:
    """Look at the machine and, if there is a recipe, at what its modules will run on.

    Args:
        recipe: of a run; None: the defaults are looked at.
        machine: instead of this one.
    """
    machine = machine or look_at_machine(DISTRIBUTIONS)
    findings = find_packages(machine)
    problems = [
        f"{found.name} {found.version or ''}: {found.note}".strip() for found in findings if found.status == "misfit"
    ]
    problems = [problem.replace(" :", ":") for problem in problems]
    engine, padding = MegatronEngineConfig(), None
    if recipe is not None:
        engine = recipe.engine
        try:
            padding = plan_padding(recipe)
        except ValueError as error:
            problems.append(str(error))
    paths = find_paths(machine, engine, None if recipe is None else recipe.model)
    if engine.backend == "transformer_engine" and not can_fuse(machine):
        lacking = "Transformer Engine is not installed" if machine.has_gpu else "there is no GPU"
        problems.append(f"engine.backend=transformer_engine: {lacking}. Set engine.backend=torch, or mend that.")
    problems += _deepspeed_problems(engine, findings)
    if recipe is not None:
        problems += [f"{path.module}: {path.path} ({path.lost})" for path in paths if path.path.startswith("FAILS")]
    fp8_recipes = recipes_of(machine.capability, machine.cuda) if machine.has_gpu else []
    return Examination(machine, findings, fp8_recipes, paths, padding, problems)


def _deepspeed_problems(engine: MegatronEngineConfig, findings: Iterable[Finding]) -> list[str]:
    """What an engine lacks that a machine without it may lack."""
    if not isinstance(engine, DeepSpeedEngineConfig):
        return []
    missing = {found.name: found for found in findings if found.status == "missing"}
    problems = []
    if lost := missing.get("deepspeed"):
        problems.append(f"engine.kind=deepspeed: DeepSpeed is not installed. {lost.mend}")
    if engine.uses_nvme and (lost := missing.get(ASYNC_IO)):
        problems.append(f"engine.nvme_path={engine.nvme_path}: {lost.note}. {lost.mend}")
    return problems


def to_json(examination: Examination) -> str:
    """The whole of it as JSON."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    return json.dumps(dataclasses.asdict(examination), indent=1, default=plain)


def print_examination(examination: Examination, console: Console | None = None) -> None:
    """Print it as tables."""
    console = console or Console()
    _print_machine(examination, console)
    packages = Table("package", "version", "state", "", title="packages")
    for found in examination.findings:
        state = f"[{_STYLES[found.status]}]{found.status}"
        packages.add_row(found.name, found.version or "-", state, found.note)
    packages.columns[0].no_wrap = True
    console.print(packages)
    paths = Table("module", "runs on", title="kernels")
    for path in examination.paths:
        paths.add_row(path.module, path.path)
    paths.columns[0].no_wrap = True
    console.print(paths)
    for path in examination.paths:
        if path.mend:
            _say(console, f"slower than it could be: {path.module} ({path.lost}). {path.mend}")
    for command in dict.fromkeys(found.mend for found in examination.findings if found.mend):
        names = ", ".join(found.name for found in examination.findings if found.mend == command)
        _say(console, f"to get {names}: {command}")
    if examination.padding is not None:
        _say(console, _describe(examination.padding))
    for problem in examination.problems:
        _say(console, f"problem: {problem}", style="bold red")
    if not examination.problems:
        console.print("Everything that is installed fits together.")


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: brackets of a command are no markup, and a narrow screen breaks no command."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_machine(examination: Examination, console: Console) -> None:
    machine = examination.machine
    if machine.has_gpu:
        capability = ".".join(map(str, machine.capability))
        cuda = ".".join(map(str, machine.cuda))
        console.print(f"{machine.num_gpus} x {machine.gpu} (compute capability {capability}), CUDA {cuda}")
        console.print(f"FP8 that this GPU can do: {', '.join(examination.fp8_recipes) or 'none'}")
    else:
        console.print("No GPU: everything runs on the CPU.")
    console.print(f"C compiler: {machine.compiler or 'none'}; SLURM: {machine.scheduler or 'none'}")


def _describe(padding: Padding) -> str:
    text = (
        f"Rows are padded to a multiple of {padding.multiple} ({padding.multiple_without_fp8} without FP8): a full row "
        f"has {padding.full_row} positions, {padding.waste_of_full_row:.1%} of them padding."
    )
    if padding.num_rows:
        text += (
            f" Of the first {padding.num_rows} samples {padding.waste_of_rows:.1%} would be padding, and "
            f"{padding.waste_of_rows_without_fp8:.1%} without FP8, each in a row of its own."
        )
    return text
