"""Count in a plan what a card computes in one kernel, and hold there what plain operators would hold.

Whether a run takes the kernel is found out before its first step (``train.kernels``), and memory must do either way.
"""

from collections.abc import Callable, Sequence

import torch

from qlora_lite.memory.marks import repeated

Tensors = tuple[torch.Tensor, ...]


def planned_kernel(compute: Callable[[], Tensors], inputs: Sequence[torch.Tensor]) -> Tensors:
    """Return ``compute()`` with the memory of its operators and the work of one that reads and writes each number once.

    Args:
        inputs: what the kernel reads, on the meta device; it writes what ``compute`` returns.
    """
    with repeated(0):
        results = compute()
    _kernel([*inputs, *results])
    return results


@torch.library.custom_op("qlora_lite::kernel", mutates_args=())
def _kernel(moved: Sequence[torch.Tensor]) -> None:
    """Do nothing: a plan counts the bytes of its arguments."""


@_kernel.register_fake
def _(moved):
    pass
