"""The log line, the metrics file and the loss picture."""

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavlm.batch import Batch, SkippedSample
from megavlm.config import load_recipe
from megavlm.engines import LossSums, StepResult
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.training.picture import draw_loss
from megavlm.training.position import Position
from megavlm.training.report import METRICS_FILE, Report, read_metrics
from megavlm.training.throughput import Throughput

EXAMPLES = Path(__file__).parents[3] / "examples"

# As scripts for Megatron-LM's logs read it: name, colon, value, between bars.
MEGATRON_LINE = re.compile(
    r"iteration\s+(\d+)/\s*(\d+) \| consumed samples:\s+(\d+) \| elapsed time per iteration \(ms\): ([\d.]+) \| "
    r"learning rate: ([\d.E+-]+) \| global batch size:\s+(\d+) \| lm loss: ([\d.E+-]+) \| loss scale: 1\.0 \| "
    r"grad norm: ([\d.naif]+) \| number of skipped iterations:\s+(\d+) \| number of nan iterations:\s+(\d+) \|"
)


class OneReplica:
    """An engine's sums on a run of one rank."""

    def sum_over_replicas(self, numbers: list[float]) -> list[float]:
        return numbers


class ThreeReplicas:
    """One of three, which all count the same."""

    def sum_over_replicas(self, numbers: list[float]) -> list[float]:
        return [3 * number for number in numbers]


@pytest.fixture
def recipe() -> Recipe:
    overrides = ["logging.log_interval=2", "training.train_iters=2000"]
    return load_recipe(EXAMPLES / "nvlm/nvlm_d_72b_sft.yaml", overrides, Recipe)


def empty_batch(skipped: list[SkippedSample]) -> Batch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, skipped=skipped)


def report(recipe: Recipe, folder: Path, iteration: int = 0) -> Report:
    return Report(recipe, OneReplica(), folder, is_writer=True, iteration=iteration)


def at(step: int) -> Position:
    return Position(step, 128 * step)


def test_log_line_is_megatrons(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    skipped = [SkippedSample("rows.jsonl:3", "image_unreadable", "cut short")]
    with report(recipe, tmp_path) as out:
        out.step(at(1), StepResult(2.0, 10, 1.5, None), [empty_batch(skipped)], lr=1e-3, data_wait=0.01)
        out.step(at(2), StepResult(4.0, 30, math.nan, "grad_not_finite"), [empty_batch([])], lr=1e-3, data_wait=0.03)
    [line] = [record.getMessage() for record in caplog.records if "consumed samples" in record.getMessage()]
    found = MEGATRON_LINE.search(line)
    assert found, line
    assert found.groups()[:3] == ("2", "2000", "256")
    assert found.groups()[4:] == ("1.000000E-03", "128", "3.000000E+00", "nan", "1", "1")
    assert "skipped samples: 1 |" in line
    assert "trained tokens per iteration: 20 |" in line
    messages = [record.getMessage() for record in caplog.records]
    assert any("rows.jsonl:3" in text and "cut short" in text for text in messages)
    assert any("grad_not_finite" in text for text in messages)


def test_throughput_is_what_all_ranks_computed_in_the_time(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Megatron-LM's line has it, and of the steps since the last line only."""
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    clock = iter([100.0, 102.0, 110.0])  # opened, after step 2, after step 4
    monkeypatch.setattr("megavlm.training.report.time.perf_counter", lambda: next(clock))
    throughput = Throughput(ThreeReplicas(), lambda batch: int(4e12), num_devices=6)
    with Report(recipe, ThreeReplicas(), tmp_path, is_writer=True, iteration=0, throughput=throughput) as out:
        for step in range(1, 5):
            batches = [empty_batch([])] * (1 if step == 4 else 2)
            out.step(at(step), StepResult(2.0, 10, 1.5, None), batches, lr=1e-3, data_wait=0.0)
    lines = [record.getMessage() for record in caplog.records if "consumed samples" in record.getMessage()]
    # 4 and 3 micro-batches of 4 TFLOP in 2 and 8 seconds, three replicas of two devices
    for line, (milliseconds, teraflops) in zip(lines, [("1000.0", "4.000"), ("4000.0", "0.750")], strict=True):
        assert f"(ms): {milliseconds} | throughput per GPU (TFLOP/s/GPU): {teraflops} | learning rate:" in line
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.value for point in events.Scalars("throughput")] == [4.0, 0.75]


def test_steps_that_trained_nothing_do_not_count_in_the_mean(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    with report(recipe, tmp_path) as out:
        out.step(at(1), StepResult(0.0, 0, 0.0, "no_trained_token"), [], lr=1e-3, data_wait=0.0)
        out.step(at(2), StepResult(4.0, 30, 1.0, None), [], lr=1e-3, data_wait=0.0)
    assert "lm loss: 4.000000E+00 |" in caplog.text
    assert "number of skipped iterations:   1 |" in caplog.text


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    with report(recipe, tmp_path) as out:
        for step in range(1, 6):
            out.step(at(step), StepResult(float(step), 10, 1.0, None), [], lr=1e-3, data_wait=0.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"iteration": 6, "lm lo')  # killed while writing
    with report(recipe, tmp_path, iteration=3) as out:
        out.step(at(4), StepResult(40.0, 10, 1.0, None), [], lr=1e-3, data_wait=0.0)
        out.validation(4, LossSums(17.5, 7))
    points = read_metrics(tmp_path)
    assert [point.get("lm loss") for point in points] == [1.0, 2.0, 3.0, 40.0, None]
    assert points[-1]["lm loss validation"] == 2.5


def test_tensorboard_has_megatrons_tags(recipe: Recipe, tmp_path: Path) -> None:
    with report(recipe, tmp_path) as out:
        for step in (1, 2):
            out.step(at(step), StepResult(1.5, 10, 1.0, None), [], lr=1e-3, data_wait=0.0)
        out.validation(2, LossSums(14.0, 7, {"contrast": 10.5}) + LossSums(14.0, 7, {"contrast": 3.5}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"lm loss", "learning-rate", "batch-size", "grad-norm", "iteration-time"} <= tags
    assert {"lm loss vs samples", "lm loss validation", "lm loss validation ppl"} <= tags
    assert read_metrics(tmp_path)[-1] == {"iteration": 2, "lm loss validation": 2.0, "contrast loss validation": 1.0}
    [point] = events.Scalars("lm loss vs samples")
    assert (point.step, point.value) == (256, 1.5)


def test_loss_picture(recipe: Recipe, tmp_path: Path) -> None:
    lines = [{"iteration": n, "lm loss": 5.0 / n, "lr": 1e-3, "trained tokens": 4} for n in range(1, 60)]
    lines.append({"iteration": 30, "lm loss": 0.0, "lr": 1e-3, "trained tokens": 0})
    lines.append({"iteration": 59, "lm loss validation": 1})
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Image.open(draw_loss(tmp_path)) as picture:
        assert picture.size > (600, 300)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # something was drawn


def test_a_full_disk_takes_nothing_that_was_said(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text("".join(json.dumps({"iteration": step, "lm loss": 1.0}) + "\n" for step in range(1, 9)))
    before = file.read_text()
    full = tmp_path / f"{METRICS_FILE}.new"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        report(recipe, tmp_path, iteration=4)
    assert file.read_text() == before
    full.unlink()
    with report(recipe, tmp_path, iteration=4):
        assert [point["iteration"] for point in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_the_first_error_is_the_one_that_is_told(recipe: Recipe, tmp_path: Path) -> None:
    """Outputs that cannot be closed on a full disk do not take the place of what went wrong before."""

    def write_and_fail() -> None:
        with report(recipe, tmp_path) as out:
            out._metrics = open("/dev/full", "a")  # noqa: SIM115
            out._metrics.write("still in memory")
            raise ValueError("a checkpoint did not fit")

    with pytest.raises(ValueError, match="a checkpoint did not fit"):
        write_and_fail()
