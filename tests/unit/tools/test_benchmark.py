"""The benchmark runs, on a tiny model, and refuses to compare what is not comparable."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "benchmark.py"
ROWS = ["fp32", "bf16_stage2"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--size", "tiny", "--threads", "1", "--rounds", "1", "--steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_rows_are_measured_on_equal_models() -> None:
    done = run_tool("--trained-share", "0.5", "--rows", *ROWS)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    titles, rows = lines[0], {line[0]: line for line in lines[2:]}
    assert list(rows) == ROWS
    for row in rows.values():
        ratio = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row[titles.index("ratio (min to max)")])
        assert ratio
        assert 0.0 < float(ratio[2]) <= float(ratio[1]) <= float(ratio[3])
        tokens = [float(row[titles.index(f"tokens/s {side}")]) for side in ("MegaVLM", "transformers")]
        # one round: the ratio is that of the speeds, but for the rounding of what is printed
        assert tokens[0] / tokens[1] == pytest.approx(float(ratio[1]), abs=0.02)
    assert len(re.findall(r"first losses: ", done.stdout)) == len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # no two programs round alike
        ("benchmark.LOSS_TOLERANCE['bf16'] = 0.0", "They do not train the same model"),
        # the count of FLOPs must be what torch sees
        ("benchmark.linear_flops = lambda *_: 1", "1 FLOPs counted from the shapes"),
    ],
)
def test_unequal_sides_are_refused(change: str, message: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import benchmark; {change}"
    arguments = ["--size", "tiny", "--threads", "1", "--rounds", "1", "--steps", "1", "--rows", "bf16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{code}; benchmark.main({arguments!r})"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert message in done.stderr


def test_packing_is_compared_on_equal_losses() -> None:
    command = [sys.executable, str(TOOL.with_name("packing_benchmark.py")), "--size", "tiny", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["--mode", "fp32", "--rounds", "1", "--samples", "8"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    padding = {side: int(share.removesuffix("%")) for side, _, share, _ in cells[2:]}
    assert list(padding) == ["packed", "padded", "transformers"]
    assert padding["packed"] < padding["padded"] == padding["transformers"]
