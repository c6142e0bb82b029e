"""What a device or a process needs beyond its tensors, as named constants with their source.

A GPU: constants from public sources, to be checked with ``tools/check/plan`` on one; those of torch's allocator were
measured without one (``tools/check/card``).
A CPU: fitted to ``tools/check/plan`` here (torch 2.13, glibc 2.36, bfloat16), above the memory that the process holds
after its imports. What malloc says at the peak (``mallinfo2``) divides it into the parts below.
"""

import os
import platform
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .bar import TRAINED
from .ledger import Moment

MIB = 2**20
CUDA_CONTEXT_BYTES = 450 * MIB  # nvidia-smi shows 300 to 500 MiB for an idle torch process, by GPU and driver
# A GPU's free memory is read before most kernels were called, and CUDA loads a kernel's code when it is first called
# (CUDA programming guide, lazy loading). A guess: no GPU has run this.
CUDA_LATER_BYTES = 128 * MIB
# One for each thread and stream (aten/src/ATen/cuda/CublasHandlePool.cpp): 32 MiB each on compute capability 9.0 and
# with train.deterministic, 8.1 MiB on others. Training has two, forward's and autograd's. Answers have two as well,
# forward's and that of the stream on which a step is recorded (``decode``); within a run the first of these is held
# already when room for prompts is planned.
CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB
# Of torch's CUDA allocator: bytes, and a share of what comes and goes within a step. tools/check/card found that
# up to 99 MiB are needed with segments that grow, and up to 842 MiB with fixed ones, but for one plan of 17, which took
# 1.5 GiB: 0.5 more than this leaves.
GROWING_SEGMENT_BYTES, GROWING_HOLES_SHARE = 128 * MIB, 0.005
FIXED_SEGMENT_BYTES, FIXED_HOLES_SHARE = 576 * MIB, 0.07
# The first time, torch.compile's inductor times kernels with as much memory as the GPU's second-level cache holds;
# data sheets name less than this. Not checked on a GPU.
CUDA_COMPILER_BYTES = 128 * MIB
HOST_PROCESS_BYTES = 1536 * MIB  # Python, torch with its CUDA libraries, pinned buffers; not yet checked beside a GPU
CPU_BUFFERS_BYTES = 56 * MIB  # modules that loading a model imports (37 MiB), thread stacks, buffers of the step
CPU_KERNEL_BYTES = 3 * MIB // 4  # for each compiled product's shape: what the two caches below keep of it
# Of kernels that oneDNN compiled, and of descriptions that torch keeps beside them (ideep, 0.25 MiB each): each cache
# holds 1,024 of its own accord. Ragged batches fill them, and a run outgrows its plan.
KERNEL_CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
KERNELS_KEPT = 128  # measured: steps take no longer; with 48 they took 3 % longer
LATER_KERNELS = "later kernels"
# Of the adapter and the optimizer's states: gradients and states are allocated among tensors of a step that are freed,
# and malloc keeps the holes.
CPU_HOLES_SHARE = 0.5
# Of torch.compile: compiled steps of tools/check/plan held 60 to 138 MiB more, the most where nothing was cached.
CPU_COMPILER_BYTES = 120 * MIB
# Where torch reads its allocator's settings, by the new and the old name, and the one that has segments grow.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GROWING = "expandable_segments:True"
DEVICE_VARIABLES = "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"  # name a share of a GPU as MIG-...


def segments_grow() -> bool:
    """Check whether torch's CUDA allocator takes memory in segments that grow: ``meter.grow_segments`` sees to it.

    Its own default, segments of fixed sizes, leaves more holes. It stays where the user has set the allocator up, on
    WSL, where growing ones can fail (pytorch issue 192330), and on a share of a GPU, where what they ask of the driver
    is not allowed (vllm pull request 42467). Torch for Windows or ROCm before 7 has none, whatever is set; on a Tegra
    they fail at the first tensor (c10/cuda/CUDAAllocatorConfig.h).
    """
    if sys.platform != "linux" or (torch.version.hip and int(torch.version.hip.partition(".")[0]) < 7):
        return False
    settings = [os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)]
    if settings:
        return any(GROWING in text for text in settings)
    is_share = any("MIG-" in os.environ.get(name, "") for name in DEVICE_VARIABLES)
    if torch.cuda.is_initialized():  # in a container that is given a share, no variable may say so
        is_share |= " MIG " in torch.cuda.get_device_name()
    return not is_share and not on_wsl() and "tegra" not in platform.release().lower()


def on_wsl() -> bool:
    """Check whether this is Linux in Windows, where a GPU's driver is Windows' own."""
    return "microsoft" in platform.release().lower()


class Overhead(NamedTuple):
    """Bytes that no tensor of the step accounts for, and why they are there.

    ``allocated``: they come from torch's CUDA allocator, so that its counter of allocated memory shows them.
    """

    name: str
    bytes: int
    why: str
    allocated: bool = False


def overheads(
    device_type: str, moments: Iterable[Moment], resident: Moment, products: int, compiling: bool = False
) -> tuple[Overhead, ...]:
    """Return what comes on top of the tensors at a step's peak.

    Args:
        device_type: "cpu" or "cuda".
        moments: the high points of a step.
        resident: what is alive between two steps.
        products: how many compiled matrix products differ in their shapes.
        compiling: blocks run through torch.compile.
    """
    if device_type == "cuda":
        peak = max(moments, key=lambda moment: moment.total)
        segments, share = FIXED_SEGMENT_BYTES, FIXED_HOLES_SHARE
        if segments_grow():
            segments, share = GROWING_SEGMENT_BYTES, GROWING_HOLES_SHARE
        holes = int(share * max(0, peak.total - resident.total))
        return (
            Overhead("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and streams of a torch process"),
            Overhead("matrix-product workspace", CUBLAS_WORKSPACE_BYTES, "cuBLAS keeps it for the whole run", True),
            Overhead("allocator segments", segments, "partly used segments, and small holes"),
            Overhead("fragmentation", holes, "holes between tensors of a step"),
            *(
                [Overhead("torch.compile", CUDA_COMPILER_BYTES, "buffers that it benchmarks kernels with")]
                if compiling
                else []
            ),
        )
    products = min(products, KERNELS_KEPT)
    kernels = products * CPU_KERNEL_BYTES
    holes = int(CPU_HOLES_SHARE * sum(resident.breakdown.get(name, 0) for name in (*TRAINED, "optimizer")))
    compiler = Overhead("torch.compile", CPU_COMPILER_BYTES, "its graphs, and what it caches")
    return (
        Overhead("buffers", CPU_BUFFERS_BYTES, "imported modules, thread stacks and buffers"),
        Overhead("matrix kernels", kernels, f"compiled for {products} shapes of products, and cached"),
        Overhead("fragmentation", holes, "holes that malloc keeps between tensors of a step"),
        *([compiler] if compiling else []),
    )


def later_kernels(products: int) -> Overhead:
    """Return what a run on a CPU comes to hold beyond the kernels of its largest step, see ``KERNELS_KEPT``."""
    more = max(0, KERNELS_KEPT - products)
    return Overhead(LATER_KERNELS, more * CPU_KERNEL_BYTES, f"up to {more} for other lengths of batches")
