"""Time divided among labels without a gap."""

import time
import types

import pytest
import torch

from megavlm.benchmark import timeline as timeline_module
from megavlm.benchmark.timeline import OTHER, Timeline

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; a test moves it."""
    now = [100.0]
    monkeypatch.setattr(timeline_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_each_moment_has_one_label(clock: list[float]) -> None:
    timeline = Timeline(CPU)
    timeline.start()
    clock[0] += 1.0
    with timeline.during("a"):
        clock[0] += 2.0
        with timeline.during("b"):
            clock[0] += 4.0
            timeline.switch("c")
            clock[0] += 8.0
        clock[0] += 16.0
    clock[0] += 32.0
    assert timeline.stop() == {OTHER: 33.0, "a": 18.0, "b": 4.0, "c": 8.0}
    timeline.start()  # begins anew
    clock[0] += 0.5
    assert timeline.stop() == {OTHER: 0.5}


def test_an_error_inside_gives_the_label_back(clock: list[float]) -> None:
    timeline = Timeline(CPU)
    timeline.start()
    with pytest.raises(ValueError, match="inside"), timeline.during("a"):
        raise ValueError("inside")
    assert timeline.label == OTHER


def test_nothing_is_counted_when_it_does_not_run() -> None:
    timeline = Timeline(CPU)
    with timeline.during("a"):
        assert timeline.switch("b") is None
    timeline.start()
    time.sleep(0.01)
    seconds = timeline.stop()
    assert set(seconds) == {OTHER}
    assert seconds[OTHER] >= 0.01
