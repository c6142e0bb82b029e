"""Row counts that a CPU's matrix kernels are made for.

oneDNN compiles a kernel for every distinct matrix height and attention length, and keeps it: 0.4 to 0.6 MiB
each, not freed when its cache is set to 0 (torch 2.13). Ragged rows have hundreds of distinct lengths, so a
run would grow by hundreds of MiB. Rounding the counts up on CPUs keeps the kernels few. CUDA needs none of
this. Remove it when a run over random lengths no longer grows without it.
"""

import torch
from torch.nn.functional import pad

CPU_MULTIPLE = 32


def kernel_rows(count: int, device: torch.device) -> int:
    """Return ``count`` rounded up to what the device's kernels are made for: a multiple of 32 on a CPU."""
    return -(-count // CPU_MULTIPLE) * CPU_MULTIPLE if device.type == "cpu" else count


def pad_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix [n, d] with rows of zeros added up to ``kernel_rows(n)``."""
    spare = kernel_rows(matrix.shape[0], matrix.device) - matrix.shape[0]
    return pad(matrix, (0, 0, 0, spare)) if spare else matrix
