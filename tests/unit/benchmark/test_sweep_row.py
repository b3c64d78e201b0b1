"""What came of rows: why one failed, the file of JSON lines, efficiency, table and picture."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from made_up import plan, write_comparison
from PIL import Image

from megavlm.benchmark.breakdown import LABELS
from megavlm.benchmark.child import RunError, TimeLimitError
from megavlm.benchmark.detail import CollectiveSpeed, Detail
from megavlm.benchmark.speed import Speed
from megavlm.benchmark.sweep_picture import draw_sweep
from megavlm.benchmark.sweep_row import Row, append_row, efficiencies, explain, read_rows
from megavlm.benchmark.sweep_table import print_sweep, row_summary, table, write_sweep

DETAIL = Detail(
    breakdown_seconds={label: 0.25 if label in ("language", "communication") else 0.0 for label in LABELS},
    most_seconds=dict.fromkeys(LABELS, 0.5),
    labelled_step_seconds=0.5,
    flops={"language": 4e9},
    useful_flops={"language": 3e9},
    tokens_per_step=300.0,
    padded_tokens_per_step=100.0,
    peak_flops_per_second=1e11,
    peak_source="made up",
    mfu=0.125,
    mfu_with_padding=0.25,
    peak_memory_bytes=[100, 200],
    collectives=[CollectiveSpeed("dp", 2, "all_reduce", 2**20, 0.001, 2**20 * 1000.0)],
)


@pytest.fixture
def speed(tmp_path: Path) -> Speed:
    """A measurement with all of its parts."""
    _, chains = plan(write_comparison(tmp_path))
    return Speed(
        step_seconds=[0.5],
        data_wait_seconds=0.0,
        samples_per_second=8.0,
        tokens_per_second=800.0,
        tiles_per_second=1.0,
        flops_per_sample=1.0,
        flops_per_second=1.0,
        peak_memory_bytes=300 * 2**20,
        memory_before_model_bytes=1,
        warmup_steps=0,
        num_ranks=1,
        recipe=chains[0].last.recipe.model_dump(mode="json"),
        detail=DETAIL,
    )


def row(series: str, ranks: int, speed: Speed | None, rate: float = 0.0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "name": f"{series},1x{ranks}",
        "layout": series,
        "settings": {"training.micro_batch_size": 2},
        "nodes": 1,
        "ranks_per_node": ranks,
        "steps": 1,
        "warmup_steps": 0,
        "scaling": "weak",
        "status": "ok" if speed else "crashed",
        "speed": dataclasses.replace(speed, samples_per_second=rate) if speed else None,
        "planned_bytes": 5.0 * 2**20,
    }
    return Row(**(fields | changes))


FAILURES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", 1, "out_of_memory", "2.00 GiB"),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
        1,
        "out_of_memory",
        "DefaultCPUAllocator",
    ),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", 137, "out_of_memory", "oom_kill event"),
    ("megavlm bench speed: error: data.train.path=x: no such file.", 1, "refused", "data.train.path=x: no such file."),
    ("[rank 1] megavlm bench speed: error: a=1: is wrong.", 1, "refused", "a=1: is wrong."),
    (
        "Traceback (most recent call last):\n  File x\nRuntimeError: first\n[rank1]: KeyError: 'second'",
        3,
        "crashed",
        "exit status 3: RuntimeError: first",
    ),
    ("[rank1]: torch.distributed.DistBackendError: gone\nlast", 1, "crashed", "DistBackendError: gone"),
    ("half\nSegmentation fault\n\n", 139, "crashed", "exit status 139: Segmentation fault"),
    ("", 137, "crashed", "exit status 137: nothing"),
]


@pytest.mark.parametrize(("output", "code", "status", "reason"), FAILURES)
def test_why_a_row_failed(output: str, code: int, status: str, reason: str) -> None:
    found = explain(RunError("x", code), output)
    assert found[0] == status
    assert reason in found[1]


def test_a_time_limit_is_none_of_the_others() -> None:
    status, reason = explain(TimeLimitError("x", 143), "CUDA out of memory\nstep 3\n----")
    assert status == "time_limit"
    assert reason.endswith("it last said: step 3")


def test_rows_come_back_and_the_newest_of_a_name_counts(tmp_path: Path, speed: Speed) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    assert read_rows(folder) == {}
    first, second = row("dp", 1, speed, 8.0), row("dp", 2, None, reason="was | bad")
    for one in (first, second):
        append_row(folder, one)
    assert read_rows(folder) == {"dp,1x1": first, "dp,1x2": second}
    better = row("dp", 2, speed, 7.0)
    append_row(folder, better)
    assert read_rows(folder) == {"dp,1x1": first, "dp,1x2": better}


def test_a_line_that_was_cut_off_is_dropped_and_the_next_is_whole(tmp_path: Path, speed: Speed) -> None:
    append_row(tmp_path, row("dp", 1, speed, 8.0))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"name": "dp,1x2", "lay')
    assert set(read_rows(tmp_path)) == {"dp,1x1"}
    append_row(tmp_path, row("dp", 2, None))
    assert set(read_rows(tmp_path)) == {"dp,1x1", "dp,1x2"}


@pytest.mark.parametrize("line", ["[]", "{}", '{"name": "x", "speed": null}', "half"])
def test_a_line_that_is_no_row(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 is no row of this version of MegaVLM .*Remove it"):
        read_rows(tmp_path)


def test_efficiency_is_by_device_and_against_the_fewest_ranks_that_ran(speed: Speed) -> None:
    rows = [
        row("dp", 4, speed, 24.0),
        row("dp", 2, speed, 16.0),
        row("dp", 1, None),
        row("tp", 2, speed, 2.0),
    ]
    assert efficiencies(rows) == {"dp,1x2": 1.0, "dp,1x4": 0.75, "tp,1x2": 1.0}
    assert efficiencies([row("dp", 1, speed, 0.0)]) == {}


def test_table_and_picture_show_good_and_bad_rows(
    tmp_path: Path, speed: Speed, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("dp", 1, speed, 8.0), row("dp", 2, speed, 12.0), row("tp", 2, None, reason="was | bad\nindeed")]
    titles, first, second, failed = table(rows)
    shown = dict(zip(titles, second, strict=True))
    assert {key: shown[key] for key in ("ranks", "samples/s/device", "efficiency", "communication", "padding")} == {
        "ranks": "2",
        "samples/s/device": "6.00",
        "efficiency": "75%",
        "communication": "50%",
        "padding": "25%",
    }
    assert (shown["MFU"], shown["peak MiB of a rank"], shown["planned MiB"]) == ("12.5%", "300", "5")
    assert (first[7], failed[2], len(failed)) == ("100%", "crashed", len(titles))
    print_sweep(rows)
    assert "tp,1x2: crashed: was | bad" in capsys.readouterr().out
    assert row_summary(rows[0]).startswith("8.00 samples/s and 800 tokens/s a device, 500 ms")
    write_sweep(tmp_path / "rows.md", rows)
    text = (tmp_path / "rows.md").read_text()
    assert "| tp,1x2 | crashed | was \\| bad indeed |" in text
    assert "| dp,1x1 | dp | 2 | all_reduce | 1 | 1.0 | 1.05 |" in text
    assert "Peak: made up." in text
    draw_sweep(tmp_path / "rows.png", rows)
    assert Image.open(tmp_path / "rows.png").width > 1000
    draw_sweep(tmp_path / "bad.png", rows[2:])
    assert Image.open(tmp_path / "bad.png").width > 500
    draw_sweep(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()
