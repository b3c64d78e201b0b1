"""Signals ask; the run stops at the end of its step."""

import signal

import pytest

from megavlm.runtime.signals import STOP_SIGNALS, stop_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        assert not request
        assert request.name is None
        signal.raise_signal(number)
        assert request
        assert request.name == number.name
    assert signal.getsignal(number) == before


def test_the_first_signal_is_the_reason_and_a_second_sigint_stops_at_once() -> None:
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
