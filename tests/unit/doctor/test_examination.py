"""What the doctor says of made-up machines."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from megavlm.config import load_recipe
from megavlm.doctor.examination import examine, print_examination, to_json
from megavlm.doctor.machine import BUILD_NEEDS, Machine, look_at_machine
from megavlm.doctor.package import ASYNC_IO, DISTRIBUTIONS, PACKAGES, find_packages
from megavlm.doctor.path import find_paths
from megavlm.engines import MegatronEngineConfig
from megavlm.recipe import Recipe

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "nvlm"
CORE = {"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.23.0"}
LAPTOP = Machine(
    versions=CORE, kernels=frozenset(), gpu=None, num_gpus=0, capability=(0, 0), cuda=(0, 0), nccl=None,
    has_driver=False, compiler="cc", scheduler=None,
)  # fmt: skip
H200 = dataclasses.replace(
    LAPTOP,
    versions={**CORE, "torch": "2.13.0+cu130", "triton": "3.5.0"},
    gpu="NVIDIA H200", num_gpus=8, capability=(9, 0), cuda=(13, 0), nccl="2.28.3", has_driver=True, scheduler="sbatch",
)  # fmt: skip
FUSED = {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0"}


def with_versions(machine: Machine, **versions: str | None) -> Machine:
    merged = {**machine.versions, **{name.replace("_", "-"): version for name, version in versions.items()}}
    return dataclasses.replace(machine, versions={name: version for name, version in merged.items() if version})


H200_FUSED = dataclasses.replace(H200, versions={**H200.versions, **FUSED})


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(EXAMPLES / name, list(overrides), Recipe)


def status(machine: Machine, name: str) -> tuple[str, str]:
    [found] = [found for found in find_packages(machine) if found.name == name]
    return found.status, found.note


def test_a_laptop_lacks_nothing_that_it_could_use() -> None:
    found = examine(recipe("tiny.yaml"), LAPTOP)
    assert found.problems == []
    assert {package.status for package in found.findings} == {"ok", "missing"}
    assert all("GPU" in package.note for package in found.findings if package.name in ("triton", "flash-attn", "apex"))
    assert all(not path.mend for path in found.paths), "there is nothing to mend without a GPU"


def test_a_gpu_without_the_package_is_told_what_it_costs() -> None:
    assert examine(None, H200).problems == []
    paths = {path.module: path for path in find_paths(H200, MegatronEngineConfig(precision="bf16"), None)}
    assert "Transformer Engine" in paths["norm and linear"].mend
    assert "FlexAttention" in paths["cross-attention"].path
    fused = MegatronEngineConfig(precision="bf16", backend="transformer_engine")
    paths = {path.module: path for path in find_paths(H200_FUSED, fused, None)}
    assert "LayerNormLinear" in paths["norm and linear"].path
    assert "FusedAdam" in paths["optimizer"].path
    assert not paths["norm and linear"].mend
    from_source = with_versions(H200, transformer_engine="2.11.0+c188b53")  # in one piece, as in NVIDIA's containers
    assert status(from_source, "transformer-engine")[0] == "untested"
    assert "FusedAdam" in {path.module: path.path for path in find_paths(from_source, fused, None)}["optimizer"]


@pytest.mark.parametrize(
    ("machine", "name", "note"),
    [
        (with_versions(LAPTOP, torch="2.10.1"), "torch", ">=2.11,<2.14 is needed"),
        (with_versions(LAPTOP, torch=None), "torch", "nothing runs"),
        (with_versions(LAPTOP, megatron_core="0.17.0"), "megatron-core", "==0.16.1 is needed"),
        (dataclasses.replace(LAPTOP, has_driver=True), "torch", "built for the CPU, and there is an NVIDIA driver"),
        (dataclasses.replace(H200, compiler=None), "triton", "finds no C compiler"),
        (
            with_versions(H200_FUSED, transformer_engine="2.12.0"),
            "transformer-engine",
            "transformer-engine-torch is 2.11.0",
        ),
        (with_versions(H200_FUSED, transformer_engine_torch=None), "transformer-engine", "is not installed"),
        (
            with_versions(H200_FUSED, transformer_engine_cu13=None, transformer_engine_cu12="2.11.0"),
            "transformer-engine",
            "transformer-engine-cu12 is installed, and torch is built with CUDA 13.0",
        ),
        (with_versions(H200_FUSED, flash_attn="2.9.0"), "flash-attn", ">=2.7.3,<=2.8.3 is needed"),
        (with_versions(LAPTOP, deepspeed="0.18.9"), "deepspeed", ">=0.19.8,<0.20 is needed"),
        (with_versions(LAPTOP, deepspeed="0.20.0"), "deepspeed", ">=0.19.8,<0.20 is needed"),
    ],
)
def test_what_does_not_fit_is_a_problem_with_a_command(machine: Machine, name: str, note: str) -> None:
    assert status(machine, name)[0] == "misfit"
    assert note in status(machine, name)[1]
    found = examine(None, machine)
    assert any(problem.startswith(name) and note in problem for problem in found.problems)
    assert all(package.mend for package in found.findings if package.status == "misfit")


def test_untested_is_no_misfit() -> None:
    assert status(with_versions(H200, torch="2.11.0+cu130"), "torch") == ("untested", "tests run with >=2.13,<2.14")
    assert status(with_versions(H200_FUSED, transformer_engine="2.11.0+c188b53"), "transformer-engine")[0] == "untested"
    assert status(H200, "torch") == ("ok", "")


@pytest.mark.parametrize(
    ("machine", "changes", "problem"),
    [
        (LAPTOP, ["engine.backend=transformer_engine"], "engine.backend=transformer_engine: there is no GPU"),
        (H200, ["engine.backend=transformer_engine"], "Transformer Engine is not installed"),
        (
            H200_FUSED,
            ["engine.backend=transformer_engine", "engine.precision=fp8", "engine.fp8.recipe=mxfp8"],
            "compute capability 9.0, and mxfp8 runs on Blackwell",
        ),
        (
            H200_FUSED,
            ["engine.backend=transformer_engine", "engine.precision=fp8", "engine.fp8.vision=fp8"],
            "vectors of a tile in model.vision is 17 on a rank",
        ),
    ],
)
def test_a_recipe_that_cannot_run_here_is_a_problem(machine: Machine, changes: list[str], problem: str) -> None:
    found = examine(recipe("tiny.yaml", *changes), machine)
    assert any(problem in text for text in found.problems), found.problems


def test_cross_attention_needs_a_compiler_of_kernels() -> None:
    without = with_versions(H200, triton=None)
    assert examine(recipe("tiny.yaml"), without).problems == []
    [problem] = examine(recipe("tiny_x.yaml"), without).problems
    assert "cross-attention: FAILS" in problem


def test_padding_of_an_fp8_recipe_is_derived_and_its_waste_told() -> None:
    changes = ["engine.backend=transformer_engine", "engine.precision=fp8", "engine.tensor_model_parallel_size=2"]
    changes += ["engine.sequence_parallel=true", "data.seq_length=250"]
    found = examine(recipe("tiny.yaml", *changes), H200_FUSED)
    assert found.problems == []
    assert found.padding is not None
    assert (found.padding.multiple, found.padding.multiple_without_fp8, found.padding.full_row) == (32, 2, 256)
    assert found.padding.waste_of_full_row == pytest.approx(6 / 256)
    parts = {path.module: path.path for path in found.paths if path.module.startswith("precision")}
    assert parts["precision of language"] == "FP8 tensorwise (hybrid)"
    assert parts["precision of vision"] == "bfloat16"
    assert "precision of experts" not in parts, "the recipe has none"


def test_emulated_fp8_needs_no_gpu_and_is_told_as_such() -> None:
    changes = ["engine.backend=fp8_emulation", "engine.precision=fp8", "engine.fp8.recipe=mxfp8"]
    found = examine(recipe("tiny.yaml", *changes), LAPTOP)
    assert found.problems == []
    parts = {path.module: path.path for path in found.paths if path.module.startswith("precision")}
    assert parts["precision of language"] == "FP8 mxfp8 (hybrid), emulated: slower than bfloat16"
    config = MegatronEngineConfig(backend="fp8_emulation", precision="fp8")
    paths = {path.module: path.path for path in find_paths(LAPTOP, config, None)}
    assert paths["experts"] == "one after another, each with FP8 scales of its own"


INSTALL = "DS_BUILD_OPS=0 pip install -c constraints.txt -r requirements-deepspeed.txt"
NVME = ("engine.kind=deepspeed", "engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/scratch")


def test_deepspeed_is_told_with_its_range_and_command() -> None:
    assert status(with_versions(LAPTOP, deepspeed="0.19.8"), "deepspeed") == ("ok", "")
    [old] = [found for found in find_packages(with_versions(LAPTOP, deepspeed="0.18.9")) if found.name == "deepspeed"]
    assert old.mend == INSTALL
    assert examine(recipe("tiny.yaml"), LAPTOP).problems == [], "who does not use it does not miss it"
    uses = recipe("tiny.yaml", "engine.kind=deepspeed", "engine.offload_optimizer=cpu")
    assert examine(uses, LAPTOP).problems == [f"engine.kind=deepspeed: DeepSpeed is not installed. {INSTALL}"]
    found = examine(uses, with_versions(LAPTOP, deepspeed="0.19.8"))
    assert found.problems == []
    paths = {path.module: path.path for path in found.paths}
    assert paths["optimizer"] == "AdamW of torch, fused over tensors, under ZeRO-2, on cpu"


def test_what_nvme_lacks_is_one_line_with_its_command() -> None:
    machine = with_versions(LAPTOP, deepspeed="0.19.8")
    uses = recipe("tiny.yaml", *NVME)
    assert status(machine, ASYNC_IO) == ("ok", "compiled when engine.nvme_path is first used")
    assert examine(uses, machine).problems == []
    without = dataclasses.replace(machine, build_lacks=("a C++ compiler", "libaio"))
    assert status(without, ASYNC_IO)[0] == "missing"
    assert examine(recipe("tiny.yaml", "engine.kind=deepspeed"), without).problems == []
    lacks = "no offload to NVMe (engine.nvme_path): a C++ compiler, libaio not found"
    command = "apt-get install g++ libaio-dev"
    assert examine(uses, without).problems == [f"engine.nvme_path=/scratch: {lacks}. {command}"]
    assert f"to get {ASYNC_IO}: {command}\n" in shown(recipe=None, machine=without)


def test_what_it_compiles_with_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(look_at_machine(()).build_lacks) <= set(BUILD_NEEDS)
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {"a C++ compiler", "ninja"} <= set(look_at_machine(()).build_lacks)
    for code, lacks_libaio in ((0, False), (1, True)):
        compiler.write_text(f"#!/bin/sh\nexit {code}\n")
        compiler.chmod(0o755)
        found = look_at_machine(()).build_lacks
        assert "a C++ compiler" not in found
        assert ("libaio" in found) == lacks_libaio


def ranges(file: str) -> dict[str, SpecifierSet]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {
        name: SpecifierSet(stated)
        for name, stated in re.findall(r"^([a-z0-9-]+)(?:\[.*\])?([<>=][^# \n]*)", text, re.MULTILINE)
    }


STATED = {
    **ranges("requirements.txt"),
    **ranges("requirements-gpu.txt"),
    **ranges("requirements-deepspeed.txt"),
    "megatron-core": ranges("constraints.txt")["megatron-core"],  # private names are used of it
}


@pytest.mark.parametrize("name", sorted(STATED.keys() & {package.name for package in PACKAGES}))
def test_ranges_are_those_of_the_requirements(name: str) -> None:
    [package] = [package for package in PACKAGES if package.name == name]
    assert SpecifierSet(package.tested or package.works) == STATED[name]


def shown(**fields: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_examination(examine(**fields), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_everything_is_shown_and_told_as_json() -> None:
    text = shown(recipe=recipe("tiny_x.yaml"), machine=H200_FUSED)
    assert all(package.name in text for package in PACKAGES)
    assert "8 x NVIDIA H200 (compute capability 9.0), CUDA 13.0" in text
    assert "FP8 that this GPU can do: delayed, tensorwise, blockwise" in text
    assert "fits together" in text
    assert "problem: " in shown(recipe=None, machine=with_versions(LAPTOP, torch="2.10.0"))
    tree = json.loads(to_json(examine(recipe("tiny.yaml"), dataclasses.replace(H200, kernels=frozenset({"amp_C"})))))
    assert tree["machine"]["kernels"] == ["amp_C"]
    assert tree["machine"]["capability"] == [9, 0]
    assert {found["name"] for found in tree["findings"]} == {ASYNC_IO, *(package.name for package in PACKAGES)}


def test_this_machine_has_what_the_tests_run_with() -> None:
    machine = look_at_machine(DISTRIBUTIONS)
    assert status(machine, "torch")[0] == "ok"
    assert machine.versions["megatron-core"] == "0.16.1"
    assert "transformer-engine" not in machine.versions or machine.has_gpu
