"""The held-out figures of the real-weights example."""

import importlib
import math
import statistics
import sys
from pathlib import Path

import pytest

from megavlm.engines.step import LossSums

FOLDER = Path(__file__).parents[3] / "examples" / "real_weights"

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
held_out = importlib.import_module("held_out")
sys.path.remove(str(FOLDER))


def test_the_gap_is_what_the_right_picture_is_worth() -> None:
    assert held_out.Losses("run", right_image=4.5, other_image=5.25).gap == 0.75
    assert held_out.other_image_file(Path("a/valid.jsonl")) == Path("a/valid_other_image.jsonl")
    right, other = [LossSums(8.0, 4), LossSums(1.0, 1)], [LossSums(12.0, 4), LossSums(3.0, 1)]
    assert held_out.gap_of(right, other) == pytest.approx(15 / 5 - 9 / 5)


def test_the_error_is_that_of_a_mean() -> None:
    """Of batches with as many tokens the jackknife is the standard error of the batches' gaps."""
    gaps = [0.1, 0.4, -0.2, 0.3, 0.0]
    right = [LossSums(10.0 + number, 10) for number in range(len(gaps))]
    other = [LossSums(10.0 + number + 10 * gap, 10) for number, gap in enumerate(gaps)]
    expected = statistics.stdev(gaps) / math.sqrt(len(gaps))
    assert held_out.gap_error(right, other) == pytest.approx(expected)
    assert math.isnan(held_out.gap_error(right[:1], other[:1]))


def test_batches_count_by_their_tokens() -> None:
    """A large batch moves the gap more than a small one as it is left out."""
    right = [LossSums(100.0, 100), LossSums(1.0, 1), LossSums(1.0, 1)]
    other = [LossSums(200.0, 100), LossSums(1.0, 1), LossSums(1.0, 1)]
    without = [0.0, 100 / 101, 100 / 101]
    middle = sum(without) / 3
    expected = math.sqrt(2 / 3 * sum((gap - middle) ** 2 for gap in without))
    assert held_out.gap_error(right, other) == pytest.approx(expected)


def test_a_run_without_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"held_out: error: .*none"):
        held_out.main([str(tmp_path / "none")])
