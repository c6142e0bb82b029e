"""Threads that wait beside other processes' work: when they sleep, and that they do."""

import logging
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_lite.train import shared_cores
from qlora_lite.train.shared_cores import QUIET_LOOKS, OtherLoad, sharing_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
# Many short parallel operations, a moment apart: threads that spin burn the time between, threads that sleep do not.
BURNED = """
import time, torch
from qlora_lite.train.shared_cores import idle_team
torch.set_num_threads(2)
def burned():
    numbers = torch.ones(2**18)
    started = time.process_time()
    for _ in range(100):
        numbers.add_(1)
        time.sleep(0.003)
    return time.process_time() - started
burned()
spinning = burned()
thread, ended = idle_team()
sleeping = burned()
ended.set()
thread.join()
print(spinning, sleeping, burned())
"""


def test_an_idle_team_has_threads_sleep_where_they_spun_and_its_end_has_them_spin_again():
    here = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    if "," not in here:
        pytest.skip("needs two CPUs")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    bound = f"import os; os.sched_setaffinity(0, [{here}])\n"  # so that three threads are more than there are CPUs
    done = subprocess.run(
        [sys.executable, "-c", bound + BURNED], env=plain, check=True, stdout=subprocess.PIPE, text=True
    )
    spinning, sleeping, again = map(float, done.stdout.split())
    assert sleeping < spinning / 2 and sleeping < again / 2


def test_load_of_a_busy_process_counts():
    load = OtherLoad()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.5)
        load.cores()
        time.sleep(1)
        beside = load.cores()
        busy.kill()
    assert beside > 0.3


@pytest.mark.parametrize(("own_niceness", "expected"), [(0, 0.75), (5, 1.25)])
def test_this_process_and_those_of_lower_priority_do_not_count(monkeypatch, own_niceness, expected):
    """Of 2 CPUs in 4 seconds: 5 busy seconds at normal priority, 2 at a lower one; this process took 2."""
    seconds = [0.0]

    def times(share):
        names = ("user", "system", "nice", "idle", "irq", "softirq", "steal")
        return SimpleNamespace(**{name: seconds[0] * share.get(name, 0) / 4 for name in names})

    each = {"user": 1.5, "system": 0.5, "nice": 1, "softirq": 0.25, "steal": 0.25, "idle": 0.5}
    own = SimpleNamespace(cpu_times=lambda: times({"user": 1.5, "system": 0.5}), nice=lambda: own_niceness)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(psutil, "Process", lambda: own)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [times(each)] * 2)
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    load = OtherLoad()
    seconds[0] = 4.0
    assert load.cores() == pytest.approx(expected)


@pytest.fixture
def seen(monkeypatch):
    """Return what the watcher is to see of other processes' load, and the end of each look."""
    monkeypatch.setattr(shared_cores, "SECONDS", 0.005)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for name in shared_cores.SET_BY_THE_USER:
        monkeypatch.delenv(name, raising=False)
    busy = [0.0]
    monkeypatch.setattr(OtherLoad, "__init__", lambda self: None)
    monkeypatch.setattr(OtherLoad, "cores", lambda self: busy[0])
    return busy


def teams():
    return [thread for thread in threading.enumerate() if thread.name == "idle-team"]


def wait_for(count):
    end = time.monotonic() + 20
    while len(teams()) != count and time.monotonic() < end:
        time.sleep(0.005)
    assert len(teams()) == count


def test_teams_are_there_while_others_are_busy_and_end_with_the_run(seen, caplog):
    with caplog.at_level(logging.INFO), sharing_cores("cpu"):
        time.sleep(0.1)
        assert not teams()
        seen[0] = 1.0
        wait_for(1)
        seen[0] = 0.1
        wait_for(0)
        seen[0] = 1.0
        wait_for(1)
    assert not teams() and caplog.text.count("1.0 of 2 cores busy") == 1 and QUIET_LOOKS > 1


def test_memory_that_runs_out_over_a_team_does_not_keep_the_run_from_its_end(monkeypatch):
    def full(*_):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "ones", full)
    started = threading.Thread(target=lambda: shared_cores._end([shared_cores.idle_team()]), daemon=True)
    started.start()
    started.join(20)
    assert not started.is_alive()


@pytest.mark.parametrize("variable", [*shared_cores.SET_BY_THE_USER, None])
def test_nothing_is_done_on_a_gpu_or_where_the_user_has_said_how_threads_wait(seen, monkeypatch, variable):
    seen[0] = 2.0
    if variable:
        monkeypatch.setenv(variable, "0")
    with sharing_cores("cpu" if variable else "cuda"):
        time.sleep(0.1)
        assert not teams()
