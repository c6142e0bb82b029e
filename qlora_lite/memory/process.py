"""What a device or a process needs beyond its tensors, as named constants with their source.

A card: constants from public sources, to be checked with ``tools/check_plan`` on one.
A CPU: measured by ``tools/check_plan`` here (torch 2.13, glibc 2.36, two threads), above the memory that the process
holds after its imports.
"""

from typing import NamedTuple

from .ledger import Moment

MIB = 2**20
CUDA_CONTEXT_BYTES = 450 * MIB  # nvidia-smi shows 300 to 500 MiB for an idle torch process, by card and driver
CUBLAS_WORKSPACE_BYTES = 32 * MIB  # torch's default on compute capability 9.0; 8.1 MiB on older cards
CUDA_SEGMENT_BYTES = 2 * 20 * MIB  # partly used segments of both pools (c10/cuda/CUDACachingAllocator.cpp)
CUDA_FRAGMENTATION_SHARE = 0.04  # of what comes and goes within a step
HOST_PROCESS_BYTES = 1536 * MIB  # Python, torch with its CUDA libraries, pinned buffers; not yet checked beside a card
CPU_KERNELS_BYTES = 52 * MIB  # compiled oneDNN kernels, thread stacks and buffers, kept after the first step
CPU_HEAP_SHARE = 0.15  # of what comes and goes within a step: freed but not yet returned by malloc


class Overhead(NamedTuple):
    """Bytes that no tensor of the step accounts for, and why they are there.

    ``allocated``: they come from torch's CUDA allocator, so that its counter of allocated memory shows them.
    """

    name: str
    bytes: int
    why: str
    allocated: bool = False


def overheads(device_type: str, peak: Moment, resident: Moment) -> tuple[Overhead, ...]:
    """Return what comes on top of the tensors at a step's peak.

    Args:
        device_type: "cpu" or "cuda".
        peak: the step's highest moment.
        resident: what is alive between two steps.
    """
    passing = max(0, peak.total - resident.total)
    if device_type == "cuda":
        return (
            Overhead("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and streams of a torch process"),
            Overhead("matrix-product workspace", CUBLAS_WORKSPACE_BYTES, "cuBLAS keeps it for the whole run", True),
            Overhead("allocator segments", CUDA_SEGMENT_BYTES, "the last, partly used segments"),
            Overhead("fragmentation", int(CUDA_FRAGMENTATION_SHARE * passing), "holes between tensors of a step"),
        )
    return (
        Overhead("kernels", CPU_KERNELS_BYTES, "compiled matrix kernels, thread stacks and buffers"),
        Overhead("heap", int(CPU_HEAP_SHARE * passing), "freed memory that malloc has not given back"),
    )
