"""Everything that only a GPU can show, in one go: ``python tools/gpu_check.py --out FOLDER``.

Parity and speed of the backends, FP8 against BF16, FlexAttention, experts, recomputation. Each part is a process of its
own with a time limit; what lacks its package says so and the others go on. Writes ``gpu_check.json`` and
``gpu_check.md``, after each part anew, so that what was measured is there however it ends. Works with any torch that
megatron-core takes. ``--cpu-smoke`` runs the same with tiny models on a CPU, where no figure means anything.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_check_parts import PARTS

import megavlm  # noqa: F401  before megatron.core

_WHOLE_SECONDS = 460.0
_SHOWN: dict[str, str] = {
    "largest relative difference": "{:.1e}",
    "last losses": "{:.4f}",
    "against bf16": "{:.4f}",
    "seconds_per_step": "{:.3f} s/step",
    "samples_per_second": "{:.2f} samples/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "{:.1f} GiB",
    "times as fast as torch bf16": "{:.2f}x torch bf16",
    "times as fast as fused bf16": "{:.2f}x fused bf16",
    "milliseconds in blocks": "{:.2f} ms in blocks",
    "milliseconds masked": "{:.2f} ms masked",
    "times as fast": "{:.2f}x",
    "largest difference": "differs by {:.1e}",
}
"""Figure -> how the table shows it; others are only in the JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; exits with 1 if a part or a row failed, and 0 if some only lacked a package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check")), help="folder")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--seconds", type=float, default=_WHOLE_SECONDS, help="for all parts together")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        _run_here(options.part, options.out, options.cpu_smoke)
        return 0
    if not options.cpu_smoke and not _has_gpu():
        parser.error("there is no CUDA GPU; --cpu-smoke tries the script itself")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    deadline = time.monotonic() + options.seconds
    for name in options.parts:
        results[name] = _run_part(name, options.out, options.cpu_smoke, deadline - time.monotonic())
        _write(options.out, results, options.cpu_smoke)
        print(table(results, options.cpu_smoke).rsplit(f"## {name}", 1)[-1].strip(), flush=True)
    return int(any(_failed(result) for result in results.values()))


def table(results: Mapping[str, Any], is_smoke: bool) -> str:
    """What was measured, as Markdown."""
    lines = ["# GPU check", ""]
    if is_smoke:
        lines += ["A smoke run with tiny models on a CPU: no figure here means anything.", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", f"{result['state']} in {result['seconds']:.0f} s", ""]
        if result["rows"]:
            lines += ["| | state | figures |", "| --- | --- | --- |"]
        for row, figures in result["rows"].items():
            shown = [text.format(figures[key]) for key, text in _SHOWN.items() if figures.get(key) is not None]
            lines.append(f"| {row} | {figures.get('state', '')} | {', '.join(shown)} |".replace("\n", " "))
        lines.append("")
    return "\n".join(lines)


def _has_gpu() -> bool:
    seen = subprocess.run(
        [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"], check=False
    )
    return seen.returncode == 0


def _run_part(name: str, out: Path, is_smoke: bool, left: float) -> dict[str, Any]:
    """Run a part in a process of its own."""
    limit = min(PARTS[name].limit_seconds, left)
    if limit < 5.0:
        return {"state": "left out: no time was left", "seconds": 0.0, "rows": {}}
    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(out)]
    start = time.monotonic()
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                [*command, *(["--cpu-smoke"] if is_smoke else [])],
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
                env=_environment(),
            ).returncode
            state = "done" if code == 0 else f"failed with exit code {code}: {_end_of(log)}"
        except subprocess.TimeoutExpired:
            state = f"failed: stopped after {limit:.0f} s"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {"state": state, "seconds": time.monotonic() - start, "rows": rows}


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (lines or ["(it said nothing)"])[-1][:500]


def _run_here(name: str, out: Path, is_smoke: bool) -> None:
    rows = PARTS[name].run(is_smoke)
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1, default=str), encoding="utf-8")


def _failed(result: Mapping[str, Any]) -> bool:
    states = [result["state"], *(str(row.get("state", "")) for row in result["rows"].values())]
    return any(state.startswith("failed") for state in states)


def _write(out: Path, results: Mapping[str, Any], is_smoke: bool) -> None:
    tree = {"is_smoke": is_smoke, "parts": results}
    (out / "gpu_check.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
    (out / "gpu_check.md").write_text(table(results, is_smoke), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
