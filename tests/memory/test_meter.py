"""What a process may still take: the machine's free memory, or what a container leaves."""

import mmap
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_lite.memory import meter, process
from qlora_lite.memory.bar import CATEGORIES
from qlora_lite.memory.ledger import Moment
from qlora_lite.memory.meter import set_memory_limit
from qlora_lite.models.load import resolve_device

GIB = 2**30


@pytest.fixture(params=["0::/{}", "4:memory:/{}\n0::/"], ids=["version 2", "version 1"])
def groups(request, tmp_path, monkeypatch):
    """Write the memory groups of a process that is in slurm/job_7: each is (limit, use, pages that can be dropped)."""
    root = tmp_path if "memory" not in request.param else tmp_path / "memory"
    names = meter._CGROUP_NAMES[str(root.relative_to(tmp_path))]
    (tmp_path / "own").write_text(request.param.format("slurm/job_7") + "\n")
    monkeypatch.setattr(meter, "_CGROUPS", tmp_path)
    monkeypatch.setattr(meter, "_OWN_CGROUPS", tmp_path / "own")

    def write(group, limit, used=700, droppable=300):
        (root / group).mkdir(parents=True, exist_ok=True)
        for name, text in (
            *zip(names, (limit, used), strict=False),
            ("memory.stat", f"anon 4\n{names[2]} {droppable}"),
        ):
            (root / group / name).write_text(str(text))

    return write


@pytest.mark.parametrize(("limit", "free"), [("1000", 1000 - 700 + 300), ("max", None), ("9" * 30, None)])
def test_what_a_container_leaves_counts_the_pages_that_can_be_dropped(groups, limit, free):
    groups(".", limit)
    found = meter.free_bytes(torch.device("cpu"))
    assert found == free or (free is None and 0.5 < found / psutil.virtual_memory().available < 2)


def test_the_limit_of_a_batch_system_s_job_or_of_a_group_around_it_is_kept(groups):
    groups("slurm/job_7", "max")
    groups("slurm", 2000)
    assert meter.free_bytes(torch.device("cpu")) == 2000 - 700 + 300
    groups("slurm/job_7", 1000)
    groups("slurm/job_8", 800)
    assert meter.free_bytes(torch.device("cpu")) == 1000 - 700 + 300


def test_without_proc_what_is_held_is_what_the_system_says_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "_STATUS", tmp_path / "none")
    before, size = meter.held_bytes(torch.device("cpu")), 2**27
    with mmap.mmap(-1, size) as pages:  # not malloc's, which gives out first what other tests gave back to it
        for _ in range(size // 2**20):
            pages.write(bytes(2**20))
        assert 0.7 * size < meter.held_bytes(torch.device("cpu")) - before < 1.3 * size


def test_a_meter_can_be_closed_by_its_own_thread(monkeypatch):
    """As when that thread collects the garbage that holds it."""
    meters, ended = [], []

    def held(_device):
        if meters and threading.current_thread() is meters[0]._thread and not ended:  # no thread of another test's
            ended.append(meters[0].close())
        return 7

    monkeypatch.setattr(meter, "held_bytes", held)
    peak_meter = meter.PeakMeter("cpu")
    meters.append(peak_meter)
    for _ in range(500):
        if ended:
            break
        time.sleep(0.01)
    assert ended == [None] and peak_meter.peak_bytes() == 7


@pytest.fixture
def settings_of_the_allocator(monkeypatch):
    """Settings that torch's allocator was given; the variables of the environment that hold some are taken out."""
    given = []
    for name in process.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process.platform, "release", lambda: "6.1.0-amd64")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    return given


def beside_tensors(compiling=False) -> dict[str, int]:
    """What a GPU's plan counts beside the tensors of a step in which 1 GiB comes and goes."""
    peak, resident = (Moment("backward", "", (size,) + (0,) * (len(CATEGORIES) - 1)) for size in (3 * 2**30, 2**31))
    return {found.name: found.bytes for found in process.overheads("cuda", [peak], resident, 0, compiling)}


def holes() -> int:
    found = beside_tensors()
    return found["allocator segments"] + found["fragmentation"]


def test_a_compiled_step_on_a_gpu_has_room_for_what_its_compiler_times_kernels_with():
    assert beside_tensors(True) == beside_tensors() | {"torch.compile": process.CUDA_COMPILER_BYTES}


def test_a_gpu_s_allocator_grows_its_segments_and_a_cpu_has_none(settings_of_the_allocator):
    meter.grow_segments(torch.device("cpu"))
    assert settings_of_the_allocator == []
    meter.grow_segments(torch.device("cuda"))
    assert settings_of_the_allocator == ["expandable_segments:True"]
    assert holes() == process.GROWING_SEGMENT_BYTES + int(process.GROWING_HOLES_SHARE * 2**30)


@pytest.mark.parametrize("name", process.ALLOCATOR_VARIABLES)
def test_an_allocator_that_the_user_has_set_up_stays_so_and_a_plan_knows(settings_of_the_allocator, name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    meter.grow_segments(torch.device("cuda"))
    assert settings_of_the_allocator == []
    assert holes() == process.FIXED_SEGMENT_BYTES + int(process.FIXED_HOLES_SHARE * 2**30)
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:True")
    meter.grow_segments(torch.device("cuda"))
    assert settings_of_the_allocator == []
    assert holes() == process.GROWING_SEGMENT_BYTES + int(process.GROWING_HOLES_SHARE * 2**30)


@pytest.mark.parametrize("release", ["5.15.167.4-microsoft-standard-WSL2", "5.15.148-tegra"])
def test_on_wsl_and_tegra_segments_stay_as_they_are(settings_of_the_allocator, release, monkeypatch):
    monkeypatch.setattr(process.platform, "release", lambda: release)
    meter.grow_segments(torch.device("cuda"))
    assert settings_of_the_allocator == [] and not process.segments_grow()


@pytest.mark.parametrize(
    ("hip", "system", "grow"),
    [
        (None, "linux", True),
        ("6.4.43482", "linux", False),
        ("7.0.51831", "linux", True),
        (None, "win32", False),
    ],
)
def test_segments_grow_where_torch_has_such_ones_whatever_is_set(
    settings_of_the_allocator, hip, system, grow, monkeypatch
):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(process.sys, "platform", system)
    meter.grow_segments(torch.device("cuda"))
    assert len(settings_of_the_allocator) == grow and process.segments_grow() is grow
    monkeypatch.setenv(process.ALLOCATOR_VARIABLES[0], process.GROWING)
    assert process.segments_grow() is grow


@pytest.mark.parametrize("name", process.DEVICE_VARIABLES)
def test_on_a_share_of_a_gpu_segments_stay_as_they_are(settings_of_the_allocator, name, monkeypatch):
    monkeypatch.setenv(name, "MIG-7f3a1c52-0000-5a6b-9c1d-0123456789ab")
    meter.grow_segments(torch.device("cuda"))
    assert settings_of_the_allocator == [] and not process.segments_grow()
    monkeypatch.setenv(process.ALLOCATOR_VARIABLES[0], process.GROWING)
    assert process.segments_grow()


@pytest.mark.parametrize(
    ("name", "grow"), [("NVIDIA A100-SXM4-40GB MIG 1g.5gb", False), ("NVIDIA A100-SXM4-40GB", True)]
)
def test_a_share_of_a_gpu_is_known_by_its_name_too(settings_of_the_allocator, name, grow, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    meter.grow_segments(torch.device("cuda"))
    assert len(settings_of_the_allocator) == grow and process.segments_grow() is grow


def test_a_process_is_held_to_its_budget_and_to_what_is_free(monkeypatch):
    card, total, shares = SimpleNamespace(type="cuda"), 16 * GIB, []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (9 * GIB, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _device: shares.append(share))
    for budget in (None, 24 * GIB, 6 * GIB, 0):
        set_memory_limit(card, budget)
    assert [share * total for share in shares] == [10 * GIB, 10 * GIB, 6 * GIB - process.CUDA_CONTEXT_BYTES, 0]


@pytest.mark.gpu
def test_on_a_gpu_segments_really_grow():
    device = resolve_device("cuda")
    held = torch.empty(2**26, device=device)
    segments = torch.cuda.memory._snapshot()["segments"]  # torch 2.13 has no public name for it
    of_it = [s for s in segments if s["address"] <= held.data_ptr() < s["address"] + s["total_size"]]
    assert [segment["is_expandable"] for segment in of_it] == [process.segments_grow()]


MANY_LENGTHS = """
import torch
from qlora_lite.memory.meter import held_bytes
from qlora_lite.models.load import resolve_device
device = resolve_device("cpu")
inputs, weights = (torch.ones(count, 64, dtype=torch.bfloat16) for count in (512, 64))
before = held_bytes(device)
for count in range(1, 513):
    inputs[:count] @ weights
print(held_bytes(device) - before)
"""


def test_kernels_of_a_cpu_take_no_more_than_a_plan_says_however_many_lengths_a_run_has():
    """In a process of its own: the caches read their limits once. Without them, 512 lengths took three times as much.

    A processor without bfloat16 products of oneDNN's takes next to nothing either way.
    """
    own = {name: value for name, value in os.environ.items() if name not in process.KERNEL_CACHES}
    done = subprocess.run([sys.executable, "-c", MANY_LENGTHS], capture_output=True, text=True, env=own, check=True)
    assert int(done.stdout) < 1.2 * process.KERNELS_KEPT * process.CPU_KERNEL_BYTES


def test_limits_of_kernels_that_the_user_has_set_stay_so_and_a_gpu_needs_none(monkeypatch):
    kernels, descriptions = process.KERNEL_CACHES
    monkeypatch.setattr(meter.os, "environ", own := {kernels: "7"})
    meter.keep_few_kernels(torch.device("cuda"))
    assert own == {kernels: "7"}
    meter.keep_few_kernels(torch.device("cpu"))
    assert own == {kernels: "7", descriptions: str(process.KERNELS_KEPT)}
