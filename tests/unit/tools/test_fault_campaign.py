"""What the fault campaign concludes from what runs leave behind; no cluster."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    import fault_campaign_judge

    return fault_campaign_judge


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    import fault_campaign

    return fault_campaign


def write_metrics(run: Path, losses: dict[int, float], tail: str = "") -> Path:
    run.mkdir(exist_ok=True)
    points: list[dict[str, Any]] = [
        {"iteration": step, "lm loss": loss, "grad norm": 0.5, "lr": 1e-3, "trained tokens": 7, "skip reason": None}
        for step, loss in losses.items()
    ]
    points.insert(1, {"iteration": 1, "sources": []})  # other lines do not belong to the curve
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points) + tail)
    return run / "metrics.jsonl"


LOSSES = {1: 3.0, 2: 2.5, 3: 0.1 + 0.2}


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (LOSSES, None),
        # the last digit of a float64
        (LOSSES | {3: 0.3}, "step 3: lm loss is 0.3, 0.30000000000000004 in the reference"),
        ({1: 3.0, 2: 2.5}, "the curve has 2 steps, the reference 3: one ends before the other"),
        ({1: 3.0, 3: 2.5, 2: 2.5}, "the curve has 3 steps, the reference 3: entry 2 is step 3"),
        ({1: 3.0, 2: float("nan"), 3: LOSSES[3]}, "step 2: lm loss is nan, 2.5 in the reference"),
    ],
)
def test_curves_are_compared_bit_for_bit(
    judge: ModuleType, tmp_path: Path, losses: dict[int, float], said: str | None
) -> None:
    reference = judge.read_curve(write_metrics(tmp_path / "reference", LOSSES))
    assert len(reference) == 3
    assert judge.compare_curves(judge.read_curve(write_metrics(tmp_path / "run", losses)), reference) == said


def test_a_step_that_is_there_twice_is_seen(judge: ModuleType, tmp_path: Path) -> None:
    reference = judge.read_curve(write_metrics(tmp_path / "run", LOSSES))
    twice = [*reference[:2], *reference[1:]]
    assert judge.compare_curves(twice, reference) == "the curve has 4 steps, the reference 3: entry 3 is step 2"


def test_a_torn_line_of_a_finished_run_is_an_error(judge: ModuleType, tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "run", LOSSES, tail='{"iteration": 4, "lm lo')
    assert judge.steps_of(tmp_path / "run") == 3, "of a run that goes on it is the line that is just being written"
    with pytest.raises(ValueError, match=r"metrics\.jsonl:5: is not a line of metrics"):
        judge.read_curve(file)


def test_a_run_that_has_not_begun_has_no_steps_and_no_checkpoints(judge: ModuleType, tmp_path: Path) -> None:
    assert judge.steps_of(tmp_path) == 0
    assert judge.checkpoints_of(tmp_path) == []


def test_only_complete_checkpoints_count(judge: ModuleType, tmp_path: Path) -> None:
    for name in ("iter_0000008", "iter_12345678", "iter_0000012.writing-0123abcd", "iter_0000004.damaged-0123abcd"):
        (tmp_path / name).mkdir()
    assert judge.checkpoints_of(tmp_path) == [8, 12345678]


@pytest.mark.parametrize(
    ("steps_done", "resumed_at", "complete", "words"),
    [
        (11, 8, [4, 8], []),
        (12, 8, [4, 8], []),  # while step 12 was being saved
        (12, 12, [4, 8], []),  # that save was complete
        (3, 0, [], []),
        (11, 4, [4, 8], ["resumed after step 4, though step 8 was saved", "7 steps were lost, 4 lie between"]),
        (9, 0, [], ["9 steps were lost, 4 lie between checkpoints"]),
        (7, 8, [4], ["resumed after step 8, of which only 7 were in the metrics"]),
    ],
)
def test_no_step_beyond_the_last_checkpoint_may_be_lost(
    judge: ModuleType, steps_done: int, resumed_at: int, complete: list[int], words: list[str]
) -> None:
    problems = judge.judge_resumption(steps_done, resumed_at, complete, limit=4)
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True)), problems


def test_resumptions_are_read_from_the_log(judge: ModuleType) -> None:
    output = "[2026-01-01 00:00:00] resuming /runs/a b/run after step 8\nresuming /r after step 12\nresuming soon\n"
    assert judge.resumed_steps(output.replace("a b", "ab")) == [8, 12]


def test_rounds_are_kept_and_a_torn_one_is_run_again(judge: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rounds.jsonl"
    assert judge.read_outcomes(file) == []
    first = judge.Outcome("kill_rank", 0, 1, moment="step 3", detection_seconds=0.5, is_curve_identical=True)
    judge.append_outcome(file, first)
    with file.open("a") as lines:
        lines.write('{"fault": "scancel", "ro')
    second = judge.Outcome("scancel", 1, 1, problems=["lost"])
    judge.append_outcome(file, second)
    assert judge.read_outcomes(file) == [first, second]
    assert [outcome.survived for outcome in (first, second)] == [True, False]


def test_the_table_has_a_row_for_each_fault(judge: ModuleType) -> None:
    outcomes = [
        judge.Outcome("b", 0, 1, moment="step 3", num_restarts=1, detection_seconds=0.5, is_curve_identical=True),
        judge.Outcome("b", 1, 1, moment="in a save", num_restarts=2, detection_seconds=12.25, steps_lost=4),
        judge.Outcome("a", 0, 1, moment="step 9", problems=["nobody noticed"]),
    ]
    lines = judge.table(outcomes, {"a": "ends", "b": "goes on", "c": "is not played"}).splitlines()
    assert lines[2:] == [
        "| a | step 9 | ends | 0 of 1 | - | 0 | 0 | 0 of 1 |",
        "| b | step 3; in a save | goes on | 2 of 2 | 0.5 to 12.2 | 1 to 2 | 4 | 1 of 2 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--faults", "kill_rank,flood"], "'flood' is not a fault. Known: all, time_limit, "),
        (["--rounds", "0"], "--rounds 0: must be at least 1."),
        (["--steps", "20"], "--steps 20: must be at least 6 times --save-interval 4"),
    ],
)
def test_wrong_usage(
    tool: ModuleType, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.parse(["--out", str(tmp_path), *arguments])
    assert words in capsys.readouterr().err


def test_faults_are_played_in_their_own_order(tool: ModuleType, tmp_path: Path) -> None:
    options = tool.parse(["--out", str(tmp_path), "--faults", "damaged,kill_rank"])
    assert options.faults == ["kill_rank", "damaged"]
    assert len(tool.parse(["--out", str(tmp_path)]).faults) == 8


def test_without_slurm_it_says_how_to_get_it(tmp_path: Path) -> None:
    """Only python can be found."""
    script = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import fault_campaign_cluster as c\n"
        "c.shutil.which = lambda name, path: None\nc.check_installed()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "SLURM is not installed on this machine" in done.stderr
    assert "tools/local_slurm.sh install" in done.stderr
