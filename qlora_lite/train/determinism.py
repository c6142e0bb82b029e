"""The same bits each time, also on a CUDA GPU.

On a CPU a step's bits are the same in each run as it is. On a GPU, some kernels add in the order in which their blocks
happen to finish (the backward pass of flash attention, cuBLAS with more than one stream), so that two runs of the same
recipe differ in the last digits; torch can be told to take others, which are slower.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_lite.errors import TrainingError, first_line

WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it; read when CUDA is first used


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use only operations that give the same bits each time, if that is wanted.

    Raises:
        TrainingError: an operation has no such version.
    """
    if not wanted:
        yield
        return
    name, needed = WORKSPACE
    given = os.environ.get(name)
    os.environ.setdefault(name, needed)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # of every tensor that is then written anyway
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = first_line(error)
        raise TrainingError(f"train.deterministic cannot be kept by this model: {reason}; set it to false") from error
    finally:
        torch.use_deterministic_algorithms(before)
        if given is None:
            os.environ.pop(name, None)
        torch.utils.deterministic.fill_uninitialized_memory = fills
