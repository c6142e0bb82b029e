"""Whose kernels work on a tensor, and in what shapes and how often.

That is what a plan changes, which is made on tensors without values for another device (``planning_for``): kernels are
chosen as for that device, and loops whose rounds need the same are cut short.

oneDNN compiles a kernel for every distinct matrix height and attention length. How many are kept is limited
(``memory.meter.keep_few_kernels``), but ragged rows have hundreds of distinct lengths, and each new one would be
compiled again. Rounding the counts up on CPUs keeps them few. CUDA needs none of that.
"""

import importlib.util
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch.nn.functional import pad

from .marks import repeated

CPU_MULTIPLE = 32
_MANY = {"cuda": 4, "cpu": 64}  # parts, from which on a plan takes their average
T = TypeVar("T")
# Least compute capability: for Turing, Triton 3.7 multiplies without tensor cores, and its kernels spill registers.
TRITON_CAPABILITY = 8, 0


class _Target(NamedTuple):
    device_type: str
    capability: tuple[int, int] | None


_planned_for: ContextVar[_Target | None] = ContextVar("what a plan is made for", default=None)


def device_type(device: torch.device) -> str:
    """Return whose kernels will work on a tensor: its device's, or those of the GPU that a plan is made for."""
    planned = _planned_for.get()
    return planned.device_type if planned else device.type


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a GPU, or in a plan stands for one that is; a plan's real tensors are on a CPU."""
    return tensor.is_cuda or (tensor.is_meta and device_type(tensor.device) == "cuda")


def has_triton() -> bool:
    """Return whether the GPU at hand, or the one that a plan is made for, can have products written in Triton."""
    capability = planned.capability if (planned := _planned_for.get()) else None
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    return _triton_is_installed() and (capability is None or capability >= TRITON_CAPABILITY)


@cache
def _triton_is_installed() -> bool:
    """Check for Triton where there is a GPU; elsewhere a plan takes it to be there."""
    return not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None


def is_planned() -> bool:
    """Return whether what runs is a plan, whose tensors have no meaning, nor values for the most part."""
    return _planned_for.get() is not None


@contextmanager
def planning_for(device_type: str, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Choose kernels and shapes as if tensors lay on such a device, and cut loops short.

    A plan's tensors are on the meta device, which says nothing of the device that it is made for.

    Args:
        capability: of the GPU; None is that at hand, or a recent one.
    """
    token = _planned_for.set(_Target(device_type, capability))
    try:
        yield
    finally:
        _planned_for.reset(token)


def pieces(total: int, size: int) -> Iterator[slice]:
    """Yield slices that cut ``total`` into pieces of ``size`` and a rest.

    In a plan every piece of one size needs the same: it runs the first, lets the second stand for all that follow
    (the first may still be in memory beside it), and the rest. A plan's time then does not grow with the length.
    """
    whole = total // size
    for number in range(whole):
        if number == 0 or not is_planned():
            yield slice(number * size, (number + 1) * size)
        elif number == 1:
            with repeated(whole - 1):
                yield slice(size, 2 * size)
    if total % size:
        yield slice(whole * size, total)


def few_of_many(parts: Sequence[T], average: Callable[[Sequence[T]], T], size: Callable[[T], Hashable]) -> Iterator[T]:
    """Yield parts that take more and more memory; in a plan, where they are many, an average one for all but the last
    two.

    A CPU's plan counts how many kernels its parts need: the average stands for as many as there are sizes. Several rows
    can share some, so that there it is for long rows only.

    Args:
        average: makes a part that takes the average work of some.
        size: returns what parts that need the same kernels have in common.
    """
    if not is_planned() or len(parts) < _MANY[_planned_for.get().device_type]:
        yield from parts
        return
    most = parts[:-2]
    with repeated(len(most), len(set(map(size, most)))):
        yield average(most)
    yield from parts[-2:]  # the last may be smaller


def kernel_rows(count: int, device: torch.device) -> int:
    """Return ``count`` rounded up to what the device's kernels are made for: a multiple of 32 on a CPU."""
    return -(-count // CPU_MULTIPLE) * CPU_MULTIPLE if device_type(device) == "cpu" else count


def pad_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix [n, d] with rows of zeros added up to ``kernel_rows(n)``."""
    spare = kernel_rows(matrix.shape[0], matrix.device) - matrix.shape[0]
    return pad(matrix, (0, 0, 0, spare)) if spare else matrix
