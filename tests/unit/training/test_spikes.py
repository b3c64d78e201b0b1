"""What counts as a spike of the loss, and what is done about it."""

import json
import math

import pytest

from megavlm.engines import StepResult
from megavlm.recipe import LossSpikeConfig
from megavlm.training.spikes import Spike, SpikeWatch, name_samples


def watch(**settings: object) -> SpikeWatch:
    return SpikeWatch(LossSpikeConfig(**{"factor": 2.0, "window": 4, "min_losses": 3, **settings}))


def feed(found: SpikeWatch, losses: list[float], first: int = 1) -> list[Spike | None]:
    """Give it steps as an engine does that asks before it updates."""
    spikes = []
    for iteration, loss in enumerate(losses, start=first):
        is_refused = found.decides_updates and not found.accepts(loss)
        reason = "loss_spike" if is_refused else None if math.isfinite(loss) else "grad_not_finite"
        spikes.append(found.take(iteration, StepResult(loss, 10, 1.0 if math.isfinite(loss) else math.nan, reason)))
    return spikes


@pytest.mark.parametrize("action", ["warn", "skip", "rewind"])
def test_a_loss_far_above_the_median_is_a_spike(action: str) -> None:
    found = watch(action=action)
    spikes = feed(found, [9.0, 4.0, 2.0, 8.0, 8.1, 2.0])  # medians before them: -, -, -, 4, 6, 8
    assert spikes[:3] == [None] * 3
    assert spikes[3] is None, "exactly the factor is no spike"
    assert spikes[4:] == [None, None]
    [spike] = feed(found, [100.0], first=7)  # the median of 2, 8, 8.1, 2
    assert spike == Spike(7, 100.0, 5.0, 4, must_rewind=action == "rewind")
    assert spike.text() == "loss spike in step 7: 100.0000 is 20.00 times the median 5.0000 of the last 4 losses"
    assert found.num_spikes == 1
    assert found.decides_updates == (action != "warn")


def test_nothing_is_a_spike_before_there_are_enough_losses() -> None:
    assert feed(watch(), [1.0, 50.0, 1.0]) == [None] * 3


def test_a_level_that_stays_high_becomes_the_usual_one() -> None:
    spikes = feed(watch(action="skip"), [1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0])
    assert [spike is not None for spike in spikes] == [False] * 4 + [True, True, False, False, False]


def test_steps_without_a_trained_token_say_nothing() -> None:
    found = watch(min_losses=1)
    for iteration in range(5):
        assert found.take(iteration, StepResult(0.0, 0, 0.0, "no_trained_token")) is None
    assert found.to_json()["losses"] == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_that_are_not_finite_put_the_run_back_after_some_in_a_row(bad: float) -> None:
    found = watch(action="rewind", rewind_after_nans=2)
    assert feed(found, [1.0, bad, 1.0, bad]) == [None] * 4
    [spike] = feed(found, [bad], first=5)
    assert spike is not None
    assert spike.must_rewind
    assert spike.text() == "loss or gradient was not finite in 2 step(s) in a row, last in step 5"
    assert feed(watch(action="skip", rewind_after_nans=1), [1.0, bad, bad]) == [None] * 3


def test_a_resumed_run_decides_as_the_whole_one() -> None:
    losses = [1.0, 1.5, 1.2, 3.1, 1.0, 2.9, 1.1, 0.9, 2.4]
    whole = feed(watch(action="skip"), losses)
    first = watch(action="skip")
    spikes = feed(first, losses[:5])
    resumed = watch(action="skip")
    resumed.restore(json.loads(json.dumps(first.to_json())))
    assert spikes + feed(resumed, losses[5:], first=6) == whole
    assert any(whole)
    resumed.restore(None)
    assert resumed.to_json() == watch().to_json()


def test_rewinds_are_counted_over_the_run_and_have_a_limit() -> None:
    found = watch(action="rewind", max_rewinds=2)
    spike = Spike(9, 8.0, 2.0, 4, must_rewind=True)
    for number in (1, 2):
        found.check_may_go_back(spike)
        found.go_back({"losses": [1.0], "num_nans_in_a_row": 0, "num_rewinds": 0})
        assert found.num_rewinds == number
    with pytest.raises(
        ValueError, match=r"max_rewinds=2: the run was put back 2 times, .* loss spike in step 9: 8\.0000"
    ):
        found.check_may_go_back(spike)


def test_more_rewinds_than_window_losses_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"min_losses=10: is above window=5"):
        LossSpikeConfig(window=5, min_losses=10)


def test_samples_are_named_but_not_all_of_many() -> None:
    assert name_samples([]) == "unknown"
    assert name_samples(["a:1", "b:2"]) == "a:1, b:2"
    assert name_samples([str(number) for number in range(20)]).endswith("14, 15 and 4 more")
