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
    [(9, "SIGKILL, perhaps for the memory"), (6, "SIGABRT: a library ended it for a fault, or NCCL"), (11, "SIGSEGV$"),
     (255, "signal 255$")],
)  # fmt: skip
def test_only_a_signal_that_may_be_for_memory_is_explained_by_it(number, says):
    assert re.match(says, describe_kill(number)) and ("memory" in describe_kill(number)) is (number == 9)
