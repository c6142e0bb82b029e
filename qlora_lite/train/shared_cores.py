"""Keep steps on a CPU fast beside other processes that use the same cores.

A step is thousands of parallel regions, each as long as its slowest thread. OpenMP's threads wait for one another by
spinning, which is fastest on idle cores. Where another process takes a core, a thread that spins keeps its own core
from the thread it waits for, and a step slows down by far more than the share of the cores that is lost. Sleeping
instead (OMP_WAIT_POLICY=passive) avoids that, but every wait on idle cores then ends with waking a thread up, and it is
settled when torch is loaded; fewer threads would add numbers up in another order.

libgomp, however, all but stops spinning while it manages more threads than there are CPUs (its manual,
GOMP_SPINCOUNT), and a thread of ours that ran one parallel operation owns a team of its own until it ends. So such
threads, which do nothing, are there while other processes are busy, and gone when they are not. No result changes.
``tests/train/test_shared_cores.py`` compares the processor time that waiting takes with them and without.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

log = logging.getLogger("qlora_lite")
SET_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SECONDS = 1.0  # between two looks
BUSY_CORES = 0.5  # of other processes, beside whom spinning costs more than it gains
QUIET_LOOKS = 5  # in a row, after which threads spin again
_PARALLEL_ELEMENTS = 2**20  # more than torch leaves to one thread


@contextmanager
def sharing_cores(device_type: str) -> Iterator[None]:
    """Let OpenMP's threads sleep as they wait, inside, whenever other processes keep these cores busy.

    Does nothing on a GPU, for one thread, where the user has said how threads wait, or where a process has no CPU
    affinity (other systems than Linux, whose torch has another OpenMP).
    """
    said = any(map(os.environ.get, SET_BY_THE_USER))
    if device_type != "cpu" or said or torch.get_num_threads() == 1 or not hasattr(os, "sched_getaffinity"):
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ended,), name="shared-cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(ended: threading.Event) -> None:
    """Look at the cores until the end, and have idle teams there while other processes need them."""
    load, threads, cpus = OtherLoad(), torch.get_num_threads(), len(os.sched_getaffinity(0))
    teams: list[tuple[threading.Thread, threading.Event]] = []
    quiet, is_said = 0, False
    while not ended.wait(SECONDS):
        busy = load.cores()
        if busy > BUSY_CORES and busy + threads > cpus + BUSY_CORES / 2:
            quiet = 0
            if not is_said:
                log.info("other processes keep %.1f of %d cores busy: steps take longer while they do", busy, cpus)
                is_said = True
            teams = teams or [idle_team() for _ in range(1 + max(0, cpus - threads) // (threads - 1))]
        elif teams:
            quiet += 1
            if quiet == QUIET_LOOKS:
                _end(teams)
                teams, quiet = [], 0
    _end(teams)


def idle_team() -> tuple[threading.Thread, threading.Event]:
    """Start a thread that owns a team of OpenMP threads and does nothing; the event ends it."""
    ended, there = threading.Event(), threading.Event()

    def own_a_team() -> None:
        with suppress(RuntimeError, MemoryError):  # without memory for it, steps stay slow, and that is all
            torch.ones(_PARALLEL_ELEMENTS).add_(1)
        there.set()
        ended.wait()

    thread = threading.Thread(target=own_a_team, name="idle-team", daemon=True)
    thread.start()
    there.wait()
    return thread, ended


def _end(teams: list[tuple[threading.Thread, threading.Event]]) -> None:
    for thread, ended in teams:
        ended.set()
        thread.join()


class OtherLoad:
    """How many of the CPUs that this process may use are kept busy by other processes, from one look to the next.

    Processes of a lower priority do not count: the scheduler takes the core from them at once.
    """

    def __init__(self) -> None:
        self._cpus, self._process = sorted(os.sched_getaffinity(0)), psutil.Process()
        self._last = self._times()

    def _times(self) -> tuple[float, float]:
        """Return the seconds that these CPUs have spent on other processes, and the time.

        What this process takes is not among them, unless it has a lower priority itself.
        """
        each = psutil.cpu_times(percpu=True)
        in_container = self._cpus[-1] >= len(each)  # one that numbers its CPUs anew
        found = each if in_container else [each[cpu] for cpu in self._cpus]
        busy = sum(times.user + times.system + times.irq + times.softirq + times.steal for times in found)
        own = self._process.cpu_times()
        counts_as_nice = self._process.nice() > 0
        return busy - (0.0 if counts_as_nice else own.user + own.system), time.monotonic()

    def cores(self) -> float:
        """Return how many cores' worth of time other processes took since the last look."""
        last, self._last = self._last, self._times()
        busy, passed = (now - before for now, before in zip(self._last, last, strict=True))
        return max(0.0, busy / passed)
