"""What a step's batches hold, and what is made of the timed steps."""

from pathlib import Path

import pytest
import torch
from made_up import measurement, plan, write_comparison

from megavlm.benchmark.memory import read_memory
from megavlm.benchmark.speed import _summarize, print_speed, read_speed, write_speed
from megavlm.benchmark.trial import TimedStep, Work
from megavlm.benchmark.useful import COUNTED


def work(samples: int, tokens: int, tiles: int, flops: int) -> Work:
    rest = (0,) * (len(COUNTED) - 1)
    return Work(samples, tokens, 2 * tokens, tiles, flops_of=(flops, *rest), useful_flops_of=(flops // 2, *rest))


def test_numbers_of_work_come_back_as_they_were() -> None:
    flops = (2**52, *range(1, len(COUNTED)))
    whole = Work(1, 2, 3, 4, flops_of=flops, useful_flops_of=tuple(range(len(COUNTED))))
    assert Work.from_numbers(whole.numbers()) == whole
    outside = range(len(COUNTED) - 2)  # experts and router are inside language
    assert COUNTED[-2:] == ("experts", "router")
    assert (whole.flops, whole.useful_flops) == (2**52 + sum(outside), sum(outside))


def test_rates_are_medians_of_the_steps(tmp_path: Path) -> None:
    _, chains = plan(write_comparison(tmp_path))
    speed = _summarize(
        expert_shares={"router": 0.05, "permute": 0.1, "exchange": 0.25, "experts": 0.2, "unpermute": 0.05},
        steps=[
            TimedStep(0.5, 0.1, work(8, 100, 10, 1000)),
            TimedStep(2.0, 0.2, work(8, 100, 10, 1000)),  # disturbed
            TimedStep(0.25, 0.3, work(4, 80, 0, 400)),
        ],
        memory=[600, 300],
        warmup_steps=1,
        num_ranks=2,
        recipe=chains[0].last.recipe,
    )
    assert speed.seconds_per_step == 0.5
    assert speed.samples_per_second == 16.0
    assert speed.tokens_per_second == 200.0
    assert speed.tiles_per_second == 5.0
    assert speed.flops_per_second == 1600.0
    assert speed.flops_per_sample == 120.0
    assert speed.dispatch_share == pytest.approx(0.4)
    assert (speed.data_wait_seconds, speed.peak_memory_bytes, speed.memory_before_model_bytes) == (0.2, 600, 300)


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = measurement(plan(write_comparison(tmp_path))[1][0], 12.0)
    write_speed(speed, tmp_path / "deep/speed.json")
    assert read_speed(tmp_path / "deep/speed.json") == speed
    print_speed(speed)
    shown = capsys.readouterr().out
    assert "0.500 (median; 0.250 to 1.000)" in shown
    assert "600 MiB (300 MiB before the model)" in shown


@pytest.mark.parametrize("text", ["[]", '{"steps": 3}', "{"])
def test_another_file_is_no_measurement(tmp_path: Path, text: str) -> None:
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(ValueError, match=r"speed\.json: is not a measurement of this version of MegaVLM .*Delete it"):
        read_speed(tmp_path / "speed.json")


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    before = read_memory(torch.device("cpu"))
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = read_memory(torch.device("cpu"))
    assert before.now <= before.peak
    assert after.peak - before.now >= 0.9 * held.numel()
