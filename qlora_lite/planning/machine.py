"""The machine a plan is for: its memory, and how fast it computes and moves.

The machine at hand is measured, in a moment (one matrix product, one copy), since no table knows what
else runs on it. For a GPU from the table, the vendor's rates are multiplied by the shares that real kernels
reach. Step times that follow from either are for ranking plans; ``tools/check/plan`` shows how far off they are.
"""

import time
from dataclasses import dataclass, replace
from functools import cache

import torch

from qlora_lite.memory.gpus import Gpu, GpuError
from qlora_lite.memory.meter import free_bytes, held_bytes, set_memory_limit
from qlora_lite.memory.process import CUDA_CONTEXT_BYTES, CUDA_LATER_BYTES, on_wsl
from qlora_lite.memory.work import Work
from qlora_lite.models.load import fast_dtype
from qlora_lite.offload.offload import host_memory
from qlora_lite.offload.stream import UNDIVIDED, Division
from qlora_lite.units import counted

BANDWIDTH_REACHED = 0.9  # of a GPU's memory bandwidth: 3.0 of 3.35 TB/s on an H100; not measured here
# Of the host, to start an operation: what tools/bench/limit calls "Python, views, autograd" was 5 to 18 us on CPUs for
# each operation that a simulation of the same step counts, the optimizer's too. A GPU's driver takes some more, which
# was not measured here.
OPERATION_SECONDS = 10e-6
WSL_OPERATION_SECONDS = 20e-6  # there the driver hands each kernel on to Windows; assumed, not measured here
# Of weights that the host updates by an 8-bit AdamW (``tools/experiments/host_updates``), on two cores; more go faster.
HOST_UPDATES_PER_SECOND = 50e6
DISK_BYTES_PER_SECOND = 2e9  # assumed of a common NVMe disk, for a file that is seen as memory; not measured here
# Large enough for a fast GPU: far longer than a launch, more than its second-level cache holds.
_PRODUCT = {"cpu": (512, 2048, 2048), "cuda": (2048, 4096, 4096)}
_FLOAT16_ROWS = 8  # on a CPU, most of which multiply float16 a hundred times more slowly than float32
_COPY_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}  # less than any step needs, and malloc gives it back at once
_BUS_BYTES, _TRIES = 64 * 2**20, 3
_WARM_UP_SECONDS = 0.05  # an idle GPU's clock takes as long to rise


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a step would run.

    ``memory_bytes`` is what the run may use in all; ``base_bytes`` what the process holds before the model (on a
    CPU: libraries; on a GPU the context is one of the constants of ``memory.process``). ``host_bytes`` is what the
    process may use of the host's memory beside a GPU, None where that is not known. ``dtype`` is what
    ``model.compute_dtype: auto`` becomes there for most models, which ``flops_per_second`` is of;
    ``float32_flops_per_second`` is of float32, where it is another one and known. ``operation_seconds`` is what the
    host takes to start an operation. It may be one of several ranks that can divide a model (``shards``), over a link
    of which ``link_bytes_per_second`` is known; None is taken for as fast as the bus. ``compute_capability`` is a
    GPU's, where it is known.
    """

    name: str
    device_type: str
    memory_bytes: int
    base_bytes: int
    flops_per_second: float
    bytes_per_second: float
    bus_bytes_per_second: float
    host_bytes: int | None = None
    dtype: torch.dtype = torch.bfloat16
    operation_seconds: float = OPERATION_SECONDS
    float32_flops_per_second: float | None = None
    shards: Division = UNDIVIDED
    link_bytes_per_second: float | None = None
    compute_capability: tuple[int, int] | None = None

    def computing_in(self, dtype: torch.dtype) -> "Machine":
        """Return the machine with its rate in a type that a step computes in, as far as that is known."""
        rate = self.float32_flops_per_second if dtype == torch.float32 else None
        return replace(self, flops_per_second=rate) if rate else self

    def shared_by(self, processes: int) -> "Machine":
        """Return the part of one of several processes, each of which has a GPU of its own, or none."""
        if processes == 1:
            return self
        name = f"each of {processes}: {self.name}"
        if self.device_type == "cpu":
            return self.renamed(name, self.memory_bytes // processes)
        host_bytes = None if self.host_bytes is None else self.host_bytes // processes
        return replace(self, name=name, host_bytes=host_bytes)

    def renamed(self, name: str, memory_bytes: int) -> "Machine":
        """Return the same speeds under another name and with another memory."""
        return replace(self, name=name, memory_bytes=memory_bytes)

    def computing_seconds(self, work: Work) -> float:
        """Estimate how long the device computes on one micro-batch's training work."""
        return work.flops / self.flops_per_second + work.moved_bytes / self.bytes_per_second

    def starting_seconds(self, work: Work) -> float:
        """Estimate how long the host takes to start the operations of the same work."""
        return self.operation_seconds * work.operations

    def bus_seconds(self, work: Work) -> float:
        """Estimate how long the transfers between host and device of the same work take."""
        return work.bus_bytes / self.bus_bytes_per_second

    def link_seconds(self, work: Work) -> float:
        """Estimate how long the weights that the same work needs of other ranks are on their way.

        Parts of one size are exchanged all at once; others are sent one after the other, this rank's too.
        """
        weights, own = self.shards.weights, self.shards.weights[self.shards.rank]
        waits = sum(weights) / (sum(weights) - own) if len({*weights}) > 1 else 1
        return waits * work.link_bytes / (self.link_bytes_per_second or self.bus_bytes_per_second)

    def disk_seconds(self, work: Work) -> float:
        """Estimate how long a disk takes to give the weights that the same work streams from it."""
        return work.disk_bytes / DISK_BYTES_PER_SECOND

    def micro_batch_seconds(self, work: Work) -> float:
        """Estimate the time of one micro-batch.

        A GPU computes while the host starts what comes next, and transfers, a disk and other ranks hide behind both, as
        far as they can.
        """
        computing, starting, link = self.computing_seconds(work), self.starting_seconds(work), self.link_seconds(work)
        if self.device_type == "cpu":
            return computing + starting + link
        return max(computing, starting, self.bus_seconds(work), self.disk_seconds(work), link)

    def seconds(self, work: Work, micro_batches: int = 1) -> float:
        """Estimate the time of a step: so many micro-batches, and one update."""
        return micro_batches * self.micro_batch_seconds(work) + work.update_bytes / self.bytes_per_second


def machine_of_gpu(gpu: Gpu) -> Machine:
    """Return a GPU of the table as a machine.

    Raises:
        GpuError: it is not a ``Gpu``.
    """
    if not isinstance(gpu, Gpu):
        raise GpuError(f"a GPU is wanted, not {gpu!r}; qlora_lite.find_gpu(NAME) finds one")
    float32 = gpu.float32_flops_per_second
    return Machine(
        gpu.name,
        "cuda",
        gpu.memory_bytes,
        0,
        products_reached(gpu) * gpu.flops_per_second,
        BANDWIDTH_REACHED * gpu.bandwidth_bytes_per_second,
        gpu.pcie_bytes_per_second,
        dtype=getattr(torch, gpu.trains_in),
        float32_flops_per_second=float32 and products_reached(gpu) * float32,
        compute_capability=gpu.compute_capability,
    )


def products_reached(gpu: Gpu) -> float:
    """Return the share of a GPU's peak that cuBLAS reaches in products of a few thousand rows; not measured here.

    GeForce GPUs, of whose tensor cores the table counts half the rate: 155.9 of 165 TFLOP/s on an RTX 4090 (pytorch
    issue 181718), 31.0 of 30 on a 4060 (triton issue 10851). An H100: 798 of 989. Of GPUs with the whole rate and less
    power, such as L4 and A6000, no figure was found.
    """
    return 0.92 if gpu.is_geforce else 0.75 if gpu.is_for_data_centres else 0.6


def this_machine(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Measure the device at hand, its speed in a type that a step would compute in once a process.

    Its memory is what is free now, on a GPU with the context that is there already.
    """
    set_memory_limit(device, None)  # what came before in this process may have had a smaller budget
    on_gpu, auto = device.type == "cuda", fast_dtype(device)
    speeds = _speeds(device, dtype, torch.get_num_threads())
    base = held_bytes(device)
    if not on_gpu:
        name = f"this CPU, {counted(torch.get_num_threads(), 'thread')}"
        return Machine(name, "cpu", free_bytes(device) + base, base, *speeds, dtype=auto)
    torch.cuda.empty_cache()  # of the measurement
    total = torch.cuda.get_device_properties(device).total_memory
    cpu, memory_bytes = torch.device("cpu"), min(total, free_bytes(device) + CUDA_CONTEXT_BYTES - CUDA_LATER_BYTES)
    host_bytes = free_bytes(cpu) + held_bytes(cpu)
    name = torch.cuda.get_device_name(device) + (" (ROCm, not verified)" if torch.version.hip else "")
    start = WSL_OPERATION_SECONDS if on_wsl() else OPERATION_SECONDS
    capability = torch.cuda.get_device_capability(device)
    return Machine(name, "cuda", memory_bytes, 0, *speeds, host_bytes, auto, start, compute_capability=capability)


@cache  # so that plans of one process are of one machine, whatever else runs on it meanwhile
def _speeds(device: torch.device, dtype: torch.dtype, _threads: int) -> tuple[float, float, float]:
    """Return FLOPs a second, and bytes a second of the device's memory and of its bus.

    The factors are random numbers: with zeros a GPU takes less power and keeps a higher clock.
    """
    (rows, inner, columns), copied = _PRODUCT[device.type], _COPY_BYTES[device.type]
    if device.type == "cpu" and dtype == torch.float16:
        rows = _FLOAT16_ROWS
    generator = torch.Generator(device).manual_seed(0)
    shapes = (rows, inner), (inner, columns)
    a, b = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for shape in shapes)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * rows * inner * columns / _fastest(lambda: a @ b, device)
    rate = bus = 2 * copied / _fastest(lambda: target.copy_(source), device)
    if device.type == "cuda":
        host = host_memory(_BUS_BYTES, device)
        bus = _BUS_BYTES / _fastest(lambda: target[:_BUS_BYTES].copy_(host, non_blocking=True), device)
    return flops, rate, bus


def _fastest(action, device: torch.device) -> float:
    """Return the least seconds of some tries, after as many as warm the device up."""
    best, tries, begun = float("inf"), 0, time.perf_counter()
    while tries < _TRIES:
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if started - begun > _WARM_UP_SECONDS:
            best, tries = min(best, time.perf_counter() - started), tries + 1
    return best
