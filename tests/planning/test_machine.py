"""The machine at hand: what is measured of it, and what that leaves behind."""

import time
from types import SimpleNamespace

import pytest
import torch

from qlora_lite.memory import process
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.memory.meter import PeakMeter, held_bytes
from qlora_lite.memory.process import CPU_BUFFERS_BYTES
from qlora_lite.memory.work import Work
from qlora_lite.planning import machine
from qlora_lite.planning.machine import machine_of_gpu, this_machine

CPU = torch.device("cpu")


def test_buffers_of_the_measurement_are_not_part_of_what_the_process_holds():
    this_machine(CPU)  # the first product starts threads and compiles a kernel
    before = held_bytes(CPU)
    machine._speeds.cache_clear()
    with PeakMeter(CPU) as meter:
        base = this_machine(CPU).base_bytes
    assert abs(base - before) < 16 * 2**20  # what malloc keeps of a product
    assert meter.peak_bytes() - before < CPU_BUFFERS_BYTES + 32 * 2**20  # less than any step adds


def test_float16_is_measured_in_a_moment_on_a_cpu_that_is_slow_in_it():
    started = time.perf_counter()
    machine._speeds.__wrapped__(CPU, torch.float16, torch.get_num_threads())
    assert time.perf_counter() - started < 10  # a product of the size that float32 takes would be 4 times 20 s


def test_a_process_measures_its_speed_once_so_that_its_plans_agree(monkeypatch):
    first = this_machine(CPU)
    monkeypatch.setattr(machine, "_fastest", None)  # which a second measurement would call
    again = this_machine(CPU)
    assert (first.flops_per_second, first.bytes_per_second) == (again.flops_per_second, again.bytes_per_second)


@pytest.mark.parametrize(
    ("release", "seconds"), [("6.8.0-51-generic", 10e-6), ("5.15.167.4-microsoft-standard-WSL2", 20e-6)]
)
def test_a_gpu_s_kernels_take_twice_as_long_to_start_on_wsl(release, seconds, monkeypatch):
    monkeypatch.setattr(process.platform, "release", lambda: release)
    monkeypatch.setattr(machine, "_speeds", lambda device, dtype, threads: (1e12, 1e12, 1e10))
    monkeypatch.setattr(machine, "set_memory_limit", lambda device, budget: None)
    monkeypatch.setattr(machine, "fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(machine, "held_bytes", lambda device: 0)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 2**33)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    found = this_machine(torch.device("cuda", 0))
    assert found.starting_seconds(Work(0, 0, 0, 1000)) == pytest.approx(1000 * seconds)
    assert found.renamed("half of it", 2**32).operation_seconds == seconds


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("rtx-4090", 0.92),
        ("rtx-4060-ti-16gb", 0.92),
        ("rtx-4070-laptop", 0.92),
        ("gtx-1080-ti", 0.92),
        ("h100", 0.75),
        ("a100-40gb", 0.75),
        ("rtx-6000-ada", 0.6),
        ("rtx-a6000", 0.6),
        ("l4", 0.6),
    ],
)
def test_products_reach_the_share_of_a_gpu_s_peak_that_is_known_of_its_kind(name, share):
    card = find_gpu(name)
    found = machine_of_gpu(card)
    assert found.flops_per_second == share * card.flops_per_second
    assert found.bytes_per_second == 0.9 * card.bandwidth_bytes_per_second


def test_a_device_is_measured_after_as_long_as_its_clock_takes_to_rise(monkeypatch):
    clock, runs = [0.0], []

    def run():
        runs.append(clock[0])
        clock[0] += 0.02 if clock[0] < 0.05 else 0.01

    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    assert machine._fastest(run, CPU) == pytest.approx(0.01)
    assert len(runs) == 3 + 3  # until 0.06 seconds, and three tries
