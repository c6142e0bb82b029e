"""Stop a run between steps and never inside one, on a signal or when its time is over.

The first SIGINT, SIGTERM or SIGHUP (a terminal that is closed; Windows has SIGBREAK for it) is noted, and the training
loop asks for it after every step: what was learned is then saved. Where nothing would be left half done (loading,
evaluating), it acts at once. A second one always acts at once, because the handlers that were there before are put back
with the first. These may be another ``Stop``'s, as the command line's are, and act in the middle of a step: an
exception says whose it is, and only with its own does a run save anything. Time is counted by a clock that nobody can
set.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# What a second signal does where signals were ignored before, as shells set it for a command in the background.
ACTING: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
HANG_UP: signal.Signals = next(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))
ACTING[HANG_UP] = signal.SIG_DFL
STANDARD_ERROR = 2  # its descriptor
CAUSES = {
    "SIGKILL": ", perhaps for the memory that it took",
    "SIGABRT": ": a library ended it for a fault, or NCCL because another rank came too late to an exchange; its last "
    "lines say which",
}


def describe_kill(number: int) -> str:
    """Return the name of a signal that has ended a process, and why it may have come."""
    name = signal.Signals(number).name if number in [*signal.Signals] else f"signal {number}"
    return name + CAUSES.get(name, "")


class StopNow(KeyboardInterrupt):
    """End the run here; not an ``Exception``, so that no library on the way takes it for a fault of its own.

    Args:
        reason: the signal's name, or the setting that ends the run.
        stop: who raised it.
    """

    def __init__(self, reason: str, stop: "Stop"):
        super().__init__(reason)
        self.stop = stop


class Stop:
    """Whether a run should end.

    Args:
        max_hours: from now; None has no limit.
    """

    def __init__(self, max_hours: float | None = None):
        self._reason: str | None = None
        self._acts_now = False
        self._end = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours

    @property
    def has_come(self) -> bool:
        """Whether a signal was noted, or its time was over when that was asked."""
        return self._reason is not None

    def check(self, agreed: Callable[[bool], bool] = bool) -> None:
        """End the run if it should.

        Args:
            agreed: whether any of the processes that train together should end, given whether this one should.

        Raises:
            StopNow: with the signal's name, or that the time is over.
        """
        if self._reason is None and time.monotonic() >= self._end:
            self._reason = "train.max_hours"
        if agreed(self._reason is not None):  # a signal that comes now is for the next time
            raise StopNow(self._reason or "another process", self)

    def _raise(self) -> None:
        if self._reason is not None:
            raise StopNow(self._reason, self)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block at any place: for work of which nothing is left half done.

        Time that is over ends nothing here, so that every process of a run takes at least one step.

        Raises:
            StopNow: as soon as a signal comes, or now if one has come.
        """
        self._raise()
        self._acts_now = True
        try:
            yield
        finally:
            self._acts_now = False

    def note(self, reason: str) -> None:
        """Remember why to stop, and do it now inside ``at_once``."""
        self._reason = reason
        if self._acts_now:
            self._raise()


def _acknowledge(name: str) -> None:
    """Write that a run is about to stop, past any stream: a handler may have come in the middle of its writing."""
    with suppress(OSError):
        clear = "\r\x1b[K" if os.isatty(STANDARD_ERROR) else ""  # of a bar
        os.write(STANDARD_ERROR, f"{clear}{name}: stopping after this step; a second signal stops at once\n".encode())


@contextmanager
def stop_signals(max_hours: float | None, twice_seconds: float = 0.0, speaks: bool = False) -> Iterator[Stop]:
    """Give a ``Stop`` that signals are noted in; the handlers from before come back at the end.

    A SIGHUP that is ignored, as nohup has it, stays so.

    Args:
        max_hours: see ``Stop``.
        twice_seconds: after a signal in which others are taken for the same one, sent by two senders.
        speaks: say on standard error that a signal has come, where it waits for the end of a step.
    """
    stop = Stop(max_hours)
    earlier: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    first = math.nan  # when it came

    def give_back() -> None:
        for each, handler in earlier.items():
            signal.signal(each, ACTING[each] if handler is signal.SIG_IGN else handler)

    def on_signal(number, _frame) -> None:
        nonlocal first
        now = time.monotonic()
        if math.isnan(first):
            first = now
            if not twice_seconds:
                give_back()
            stop.note(signal.Signals(number).name)
            if speaks:
                _acknowledge(signal.Signals(number).name)
        elif now - first >= twice_seconds:
            give_back()
            signal.raise_signal(number)

    try:
        for number in ACTING:
            if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                earlier[number] = signal.signal(number, on_signal)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield stop
    finally:
        restore()
