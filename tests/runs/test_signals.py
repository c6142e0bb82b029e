"""A signal is noted once, also where two senders send it; a later one acts at once."""

import re
import signal

import pytest

from qlora_lite.runs import signals
from qlora_lite.runs.signals import StopNow, describe_kill, stop_signals


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


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (9, "SIGKILL, perhaps for the memory"),
        (6, "SIGABRT: a library ended it for a fault, or NCCL"),
        (11, "SIGSEGV$"),
        (255, "signal 255$"),
    ],
)
def test_only_a_signal_that_may_be_for_memory_is_explained_by_it(number, says):
    assert re.match(says, describe_kill(number)) and ("memory" in describe_kill(number)) is (number == 9)


def test_a_signal_that_waits_for_the_end_of_a_step_is_acknowledged_at_once(capfd):
    with stop_signals(None) as outer, outer.at_once():
        with stop_signals(None, speaks=True) as stop:
            with pytest.raises(StopNow), stop.at_once():
                signal.raise_signal(signal.SIGINT)  # which is its own answer
            assert capfd.readouterr().err == ""
        for speaks in (False, True):
            with stop_signals(None, speaks=speaks) as stop:
                signal.raise_signal(signal.SIGTERM)
                said = "SIGTERM: stopping after this step; a second signal stops at once\n" if speaks else ""
                assert capfd.readouterr().err == said and stop.has_come
