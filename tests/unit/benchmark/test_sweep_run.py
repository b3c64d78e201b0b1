"""Running a sweep: what happens to each row, whatever its processes do, and what a second call does."""

import json
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up import TINY

from megavlm.benchmark import child, sweep_run
from megavlm.benchmark.child import RunError
from megavlm.benchmark.speed import Speed
from megavlm.benchmark.sweep_row import read_rows
from megavlm.benchmark.sweep_run import Place, run_sweep
from megavlm.config import load_recipe
from megavlm.recipe import Recipe

LAUNCHER = """#!/usr/bin/env bash
# NODES RANKS -m megavlm bench speed RECIPE --detail --json FILE ...
echo "$1 nodes of $2 ranks: ${*:3:4}" >>FOLDER/calls.txt
json=${10}
case $(grep -o 'global_batch_size: .*' "$7") in
    *16) cp FOLDER/speed.json "$json" ;;
    *32) echo "torch.OutOfMemoryError: CUDA out of memory."; exit 1 ;;
    *64) THIRD ;;
esac
"""


@pytest.fixture(autouse=True)
def no_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tokenizer nor data are there."""
    monkeypatch.setattr(sweep_run, "_check_inputs", lambda sweep, overrides: None)
    monkeypatch.setattr(sweep_run, "recipe_vocab_size", lambda recipe: 300)


def sweep_in(folder: Path, third: str, **changes: Any) -> tuple[Path, Place]:
    """A sweep of three rows and a launcher: the first is good, the second needs too much memory."""
    launcher = folder / "launcher.sh"
    launcher.write_text(LAUNCHER.replace("FOLDER", str(folder)).replace("THIRD", third))
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    recipe = load_recipe(TINY, [], Recipe).model_dump(mode="json")
    numbers: dict[str, Any] = dict.fromkeys(
        ("samples_per_second", "tokens_per_second", "tiles_per_second", "flops_per_sample", "flops_per_second"), 1.0
    )
    numbers |= {"peak_memory_bytes": 1, "memory_before_model_bytes": 1, "warmup_steps": 2, "num_ranks": 1}
    speed = Speed(step_seconds=[1.0], data_wait_seconds=0.0, recipe=recipe, **numbers)
    (folder / "speed.json").write_text(json.dumps(speed.__dict__))
    content = {
        "recipe": str(TINY),
        "layouts": {"dp": []},
        "nodes": [1, 2, 4],
        "save": str(folder / "rows"),
        "time_limit_minutes": 0.02,
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path, Place(num_nodes=4, ranks_per_node=1, launcher=str(launcher))


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def statuses(folder: Path) -> dict[str, str]:
    return {name: row.status for name, row in read_rows(folder / "rows").items()}


def test_a_failed_row_is_a_row_and_the_next_one_begins(tmp_path: Path) -> None:
    path, place = sweep_in(tmp_path, "echo 'RuntimeError: no'; exit 3", time_limit_minutes=1)
    rows = run_sweep(path, [], place)
    assert [row.status for row in rows] == ["ok", "out_of_memory", "crashed"]
    assert rows[2].reason == "exit status 3: RuntimeError: no"
    assert all(row.planned_bytes and row.planned_bytes > 1e5 for row in rows)
    assert rows[1].recipe is not None
    assert rows[1].recipe["training"]["global_batch_size"] == 32
    assert calls(tmp_path) == [f"{nodes} nodes of 1 ranks: -m megavlm bench speed" for nodes in (1, 2, 4)]
    assert (tmp_path / "rows/rows.md").read_text().count("out_of_memory") == 2
    assert (tmp_path / "rows/rows.png").exists()
    # what is there is not run again, whatever came of it ...
    assert run_sweep(path, [], place) == rows
    assert len(calls(tmp_path)) == 3
    # ... but on request, and then only what failed
    sweep_in(tmp_path, f"cp {tmp_path}/speed.json $json", time_limit_minutes=1)
    again = run_sweep(path, [], place, is_again=True)
    assert [row.status for row in again] == ["ok", "out_of_memory", "ok"]
    assert len(calls(tmp_path)) == 5


def test_a_row_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_GRACE_SECONDS", 0.5)
    # nobody ends when asked, and the inner one has a session of its own, as ranks of torchrun have
    # (bash itself would tell of its killed child)
    stubborn = "exec 2>/dev/null\ntrap '' TERM\nsleep 300 &\nwait; wait\n"
    (tmp_path / "inner.sh").write_text(f"echo $$ >{tmp_path}/inner\n{stubborn}")
    (tmp_path / "outer.sh").write_text(f"setsid bash {tmp_path}/inner.sh &\n{stubborn}")
    script = f"exec bash {tmp_path}/outer.sh"
    path, place = sweep_in(tmp_path, script)
    start = time.monotonic()
    rows = run_sweep(path, [], place)
    assert [row.status for row in rows] == ["ok", "out_of_memory", "time_limit"]
    assert "it last said: nothing" in rows[2].reason
    assert time.monotonic() - start < 60
    inner = int((tmp_path / "inner").read_text())
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{inner}").exists() and "Z" not in Path(f"/proc/{inner}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    path, place = sweep_in(tmp_path, "kill -USR1 $PPID; sleep 1; exit 1", time_limit_minutes=1)
    with pytest.raises(RunError, match=r"dp,4x1: stopped by SIGUSR1\. The same command goes on") as stopped:
        run_sweep(path, [], place)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert statuses(tmp_path) == {"dp,1x1": "ok", "dp,2x1": "out_of_memory"}
    sweep_in(tmp_path, f"cp {tmp_path}/speed.json $json", time_limit_minutes=1)
    assert [row.status for row in run_sweep(path, [], place)] == ["ok", "out_of_memory", "ok"]
    assert [line[0] for line in calls(tmp_path)] == ["1", "2", "4", "4"]


def test_rows_that_need_more_nodes_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, place = sweep_in(tmp_path, "exit 1")
    small = Place(num_nodes=1, launcher=place.launcher)
    assert [row.name for row in run_sweep(path, [], small)] == ["dp,1x1"]
    assert "2 row(s) wait for more nodes: there are 1, and they need up to 4" in capsys.readouterr().out
    assert len(run_sweep(path, [], place)) == 3
    assert len(calls(tmp_path)) == 3


def test_a_refused_row_is_looked_at_anew(tmp_path: Path) -> None:
    path, place = sweep_in(tmp_path, "exit 1", layouts={"tp2": ["engine.tensor_model_parallel_size=2"]}, nodes=[1])
    (refused,) = run_sweep(path, [], place)
    assert (refused.status, refused.recipe, calls(tmp_path)) == ("refused", None, [])
    assert refused.reason.startswith("world_size=1: is no multiple")
    assert run_sweep(path, [], place) == [refused]
    assert len((tmp_path / "rows/rows.jsonl").read_text().splitlines()) == 1


def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    path, place = sweep_in(tmp_path, "exit 1")
    run_sweep(path, ["nodes=[1]"], place)
    for override, message in (
        ("training.seed=9", r"rows/dp,1x1 was made with other settings: recipe\.training\.seed was 1234 and is 9 now"),
        ("steps=9", r"steps was 5 and is 9 now\. Choose another `save`"),
    ):
        with pytest.raises(ValueError, match=message):
            run_sweep(path, [override], place)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place(num_nodes=2), "--num-nodes=2: without --launcher all ranks run on this machine"),
        (Place(num_nodes=0), "--num-nodes=0: must be at least 1"),
        (Place(ranks_per_node=0), "--nproc-per-node=0: must be at least 1"),
    ],
)
def test_where_rows_cannot_run(tmp_path: Path, place: Place, message: str) -> None:
    path, _ = sweep_in(tmp_path, "exit 1")
    with pytest.raises(ValueError, match=message):
        run_sweep(path, [], place)


def test_a_rank_may_not_run_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, place = sweep_in(tmp_path, "exit 1")
    monkeypatch.setitem(os.environ, "RANK", "1")
    with pytest.raises(ValueError, match="RANK=1: a sweep starts the ranks of its rows itself"):
        run_sweep(path, [], place)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    path, place = sweep_in(tmp_path, "exit 1")
    with pytest.raises(ValueError, match=r"save=/proc/rows: cannot be made \(.*Choose another folder"):
        run_sweep(path, ["save=/proc/rows"], place)
