"""Go on when memory runs out: take fewer tokens through the model at once.

A step that ran out of memory is done again from its start, its rows in smaller micro-batches. Rows do not see each
other and each target token counts the same, so the step is the same step; only the order of additions differs.
(Halving the batch size, the other known cure, changes the batch, the schedule and the steps of an epoch.)

Allocators do not agree on one error: torch's own class is a RuntimeError, and so are the CPU allocator's and those of
cuBLAS and cuDNN, which can be told from other faults only by their words.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from qlora_lite.errors import DoesNotFitError, first_line

from .workload import Workload

_OF_THE_HOST = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",  # torch's on Linux and macOS, on Windows
    "std::bad_alloc",
    "HOST_ALLOCATION_FAILED",
)
_OF_A_DEVICE = (
    "out of memory",  # CUDA, HIP, MPS and XPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # what it says on a GPU that is full
    "NVML_SUCCESS ==",  # torch fails over its own message where it may not ask who uses the GPU (pytorch issue 112377)
)
CURES = "lower data.max_tokens or lora.rank, or give it more memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says, in any allocator's words, that there is no memory left."""
    return is_out_of_device_memory(error) or isinstance(error, MemoryError) or _says(error, _OF_THE_HOST)


def another_plan_may_help(error: BaseException, device: torch.device) -> bool:
    """Return whether it is the device that has no memory left: beside a GPU, no plan is a cure for the host's."""
    return is_out_of_memory(error) if device.type == "cpu" else is_out_of_device_memory(error)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Return whether it is a GPU that has no memory left, and not the host."""
    return isinstance(error, torch.OutOfMemoryError) or (_says(error, _OF_A_DEVICE) and not _says(error, _OF_THE_HOST))


def _says(error: BaseException, wordings: Iterable[str]) -> bool:
    return isinstance(error, RuntimeError) and any(wording in str(error) for wording in wordings)


def cut(workload: Workload, micro_batches: Iterable[Sequence], most_tokens: int | None) -> list[Sequence]:
    """Cut micro-batches between rows so that none has more tokens than the limit, unless it is one row.

    Args:
        most_tokens: the limit; None leaves all as they are.
    """
    parts = []
    for rows in micro_batches:
        start = room = 0
        for place, length in enumerate(workload.batches.lengths(rows)):
            if most_tokens is not None and place > start and length > room:
                parts.append(rows[start:place])
                start = place
            room = (room if place > start else most_tokens or 0) - length
        parts.append(rows[start:])
    return parts


def lower_limit(workload: Workload, parts: Sequence[Sequence], reason: str) -> int:
    """Return the next lower limit of tokens after memory ran out: half of the largest part.

    Raises:
        DoesNotFitError: the largest part is one row, which cannot be cut.
    """
    tokens, rows = max(((sum(workload.batches.lengths(part)), part) for part in parts), key=lambda found: found[0])
    if len(rows) == 1:
        raise DoesNotFitError(
            f"the row {workload.batches.places(rows)[0]} alone, with {tokens} tokens, needs more memory than there is "
            f"({reason}); {CURES}"
        )
    return tokens // 2


@contextmanager
def explaining_memory(cure: str = CURES, what: str = "the device ran out of memory") -> Iterator[None]:
    """Turn an allocator's error into one that names the cures.

    Raises:
        DoesNotFitError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(f"{what} ({first_line(error)}); {cure}") from error


def no_retry(where: str) -> AbstractContextManager[None]:
    """Make memory that runs out an error where some weights may have their new values already.

    Doing the step again would count it twice for them.

    Raises:
        DoesNotFitError: memory ran out.
    """
    cure = f"resume from the last checkpoint with train --resume, and {CURES}"
    return explaining_memory(cure, f"memory ran out {where}")


def free_cached_memory(device: torch.device) -> None:
    """Give memory that no tensor uses back to the device, or to the operating system."""
    if device.type == "cuda":
        if torch.cuda.is_initialized():
            # what was freed may still be copied from or to, and the allocator waits for its own stream alone
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # of pinned memory; torch 2.11 has no public function for it
    elif os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's
        trim(0)
