"""A run of a model with experts, from the command line: what it tells of its routers."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]

EXPERTS = "model.language.moe={num_moe_experts: 4, moe_layer_freq: [0, 1], moe_expert_capacity_factor: 1.0}"
LINE = re.compile(
    r"load balancing loss: [\d.E+-]+ \| router max/mean load: image [\d.]+ text [\d.]+ \| dead experts: \d+ \| "
    r"dropped tokens: ([\d.]+)% \|"
)


def test_a_run_with_experts_tells_of_its_routers(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    result = megavlm("train", recipe, "--nproc-per-node", 2, EXPERTS, "training.train_iters=6")
    assert result.returncode == 0, result.stdout
    dropped = LINE.findall(result.stdout)
    assert len(dropped) == 2, result.stdout  # after step 4, and after the last
    assert any(float(share) > 0.0 for share in dropped)
    points = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    routers = [point for point in points if "router" in point]
    loads = [point for point in points if "router load" in point]
    assert [point["iteration"] for point in routers] == [4, 6]
    assert [(point["iteration"], point["router load"]["steps"]) for point in loads] == [(4, 4), (6, 2)]
    for point in loads:
        assert point["router load"]["layers"] == [1]
        assert [view["name"] for view in point["router load"]["views"]] == ["all", "image", "text"]
    every = [view["tokens"] for view in loads[-1]["router load"]["views"]]
    assert every[0] == every[1] + every[2]
    assert Image.open(tmp_path / "run/router.png").size > (600, 300)
    assert Image.open(tmp_path / "run/loss.png").size > (600, 300)
