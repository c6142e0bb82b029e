"""A signal is noted once, also where two senders send it; a later one acts at once."""

import signal

import pytest

from qlora_lite.runs import signals
from qlora_lite.runs.signals import StopNow, stop_signals


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


def test_a_signal_that_two_senders_send_is_one_and_a_later_one_acts_at_once(clock):
    with (
        stop_signals(None) as outer,
        outer.at_once(),
        pytest.raises(StopNow) as raised,
        stop_signals(None, 5.0) as stop,
    ):
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 4.9
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopNow, match="SIGTERM"):
            stop.check()
        clock[0] += 0.2
        signal.raise_signal(signal.SIGINT)
    assert raised.value.stop is outer and str(raised.value) == "SIGINT"


def test_of_one_process_the_second_signal_acts_at_once(clock):
    with stop_signals(None) as outer, outer.at_once(), pytest.raises(StopNow) as raised, stop_signals(None) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.stop is outer is not stop
