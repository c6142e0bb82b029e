"""What a device or a process needs beyond its tensors, as named constants with their source.

A card: constants from public sources, to be checked with ``tools/check_plan`` on one.
A CPU: measured by ``tools/check_plan`` here (torch 2.13, glibc 2.36, two threads), above the memory that the process
holds after its imports.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .ledger import Moment

MIB = 2**20
CUDA_CONTEXT_BYTES = 450 * MIB  # nvidia-smi shows 300 to 500 MiB for an idle torch process, by card and driver
CUBLAS_WORKSPACE_BYTES = 32 * MIB  # torch's default on compute capability 9.0; 8.1 MiB on older cards
CUDA_SEGMENT_BYTES = 2 * 20 * MIB  # partly used segments of both pools (c10/cuda/CUDACachingAllocator.cpp)
CUDA_FRAGMENTATION_SHARE = 0.04  # of what comes and goes within a step
HOST_PROCESS_BYTES = 1536 * MIB  # Python, torch with its CUDA libraries, pinned buffers; not yet checked beside a card
CPU_KERNELS_BYTES = 58 * MIB  # compiled oneDNN kernels, thread stacks and buffers, kept after the first step
CPU_LOGITS_SHARE = 0.75  # of the largest logits: scratch of the head's products, and pages that malloc keeps


class Overhead(NamedTuple):
    """Bytes that no tensor of the step accounts for, and why they are there.

    ``allocated``: they come from torch's CUDA allocator, so that its counter of allocated memory shows them.
    """

    name: str
    bytes: int
    why: str
    allocated: bool = False


def overheads(device_type: str, moments: Iterable[Moment], resident: Moment) -> tuple[Overhead, ...]:
    """Return what comes on top of the tensors at a step's peak.

    Args:
        device_type: "cpu" or "cuda".
        moments: the high points of a step.
        resident: what is alive between two steps.
    """
    moments = list(moments)
    peak = max(moments, key=lambda moment: moment.total)
    if device_type == "cuda":
        fragmentation = int(CUDA_FRAGMENTATION_SHARE * max(0, peak.total - resident.total))
        return (
            Overhead("CUDA context", CUDA_CONTEXT_BYTES, "driver, kernels and streams of a torch process"),
            Overhead("matrix-product workspace", CUBLAS_WORKSPACE_BYTES, "cuBLAS keeps it for the whole run", True),
            Overhead("allocator segments", CUDA_SEGMENT_BYTES, "the last, partly used segments"),
            Overhead("fragmentation", fragmentation, "holes between tensors of a step"),
        )
    logits = max(moment.breakdown.get("logits", 0) for moment in moments)
    return (
        Overhead("kernels", CPU_KERNELS_BYTES, "compiled matrix kernels, thread stacks and buffers"),
        Overhead("scratch of the head", int(CPU_LOGITS_SHARE * logits), "of its products, and pages that malloc keeps"),
    )
