"""The GPU check runs from end to end with tiny models on a CPU, and tells what it could not do."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
MEASURED = ["backends", "attention", "experts"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TOOLS / "gpu_check.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_smoke_run_measures_what_a_cpu_can_and_names_what_is_missing(tmp_path: Path) -> None:
    done = run_tool("--cpu-smoke", "--out", str(tmp_path), "--parts", *MEASURED)
    logs = "\n".join(file.read_text()[-1500:] for file in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:] + logs
    tree = json.loads((tmp_path / "gpu_check.json").read_text())
    parts = tree["parts"]
    assert tree["is_smoke"] is True
    assert list(parts) == MEASURED
    assert {part["state"] for part in parts.values()} == {"done"}
    # the same backend from the same checkpoint: bit for bit
    for row in parts["backends"]["rows"].values():
        assert (row["state"], row["largest relative difference"]) == ("measured", 0.0)
    for row in parts["attention"]["rows"].values():
        assert row["largest difference"] < 1e-5  # measured 4.8e-7
    experts = parts["experts"]["rows"]
    assert experts["grouped, FP8"] == {"state": "not installed: Transformer Engine"}
    for name in ("one after another, torch", "grouped, torch"):
        # near the logarithm of the 128 tokens, as of fresh weights
        assert experts[name]["losses"] == pytest.approx([math.log(128)] * 3, rel=0.05)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "no figure here means anything" in text
    assert "| grouped, FP8 | not installed: Transformer Engine |" in text


def test_without_a_gpu_it_says_so() -> None:
    done = run_tool()
    assert done.returncode == 2
    assert "there is no CUDA GPU; --cpu-smoke tries the script itself" in done.stderr


def test_a_part_that_hangs_or_fails_leaves_the_others(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, stdout: Any, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        name = command[command.index("--part") + 1]
        if name == "backends":
            raise subprocess.TimeoutExpired(command, timeout)
        if name == "attention":
            stdout.write(b"RuntimeError: no such kernel\n")
            stdout.flush()
            return subprocess.CompletedProcess(command, 1)
        (tmp_path / f"{name}.json").write_text('{"row": {"state": "measured", "mfu": 0.456}}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    parts = ["--parts", "backends", "attention", "speed_D"]
    assert tool.main(["--cpu-smoke", "--out", str(tmp_path), *parts]) == 1
    text = (tmp_path / "gpu_check.md").read_text()
    assert "failed: stopped after 110 s" in text
    assert "failed with exit code 1: RuntimeError: no such kernel" in text
    assert "| row | measured | MFU 45.6% |" in text
    assert tool.main(["--cpu-smoke", "--out", str(tmp_path), "--seconds", "1", "--parts", "experts"]) == 0
    assert "left out: no time was left" in (tmp_path / "gpu_check.md").read_text()


def test_a_row_that_fails_says_why_and_leaves_the_next_one_whole(tool: ModuleType) -> None:
    parts = sys.modules["gpu_check_parts"]
    size = parts.SMOKE_SIZES["small"]
    illegal = {**parts.TORCH, "recompute_granularity": "full"}  # lacks how
    failed = parts._try(illegal, parts._measure, size, "D", illegal, 1)
    assert failed["state"].startswith("failed: ValidationError: ")
    half_way = parts._try(parts.TORCH, lambda: parts._measure(size, "no such fusion", parts.TORCH, 1))
    assert half_way["state"].startswith("failed: ")
    assert parts._try(parts.TORCH, parts._measure, size, "D", parts.TORCH, 1)["state"] == "measured"
