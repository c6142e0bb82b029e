"""Count what a step computes and moves, for an estimate of its time.

Four totals are mostly enough for a ranking of plans: floating-point operations of products and attention (most by
torch's own formulas), bytes that all other operations read and write (dequantising a weight reads half a byte and
writes two), bytes that travel between device and host, and the operations themselves, which the host has to start one
by one. Beside them, how many compiled products differ (a CPU compiles a kernel for each), and bytes that a disk gives.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from .marks import marks

LARGE_BYTES = 1 << 17  # of a product's operands and result
# From so many multiplications on, a CPU compiles a kernel for a 16-bit product, however small its operands are
# (mkldnn_gemm_min_size in aten/src/ATen/native/mkldnn/Matmul.cpp): 0.4 to 0.6 MiB each, and none in float32.
COMPILED_16_BIT = 16 * 16 * 16
_aten = torch.ops.aten
_COPY = _aten.copy_.default


def _packets(*names: str) -> set:
    return {getattr(_aten, name) for name in names}


# What moves nothing, although torch does not call it a view; what writes without reading its first argument; what reads
# a few rows of its first argument, and what adds its last one to as many.
_FREE = _packets("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
_FILLS = _packets(
    "copy_", "zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"
)
_GATHERS = _packets("index", "embedding", "gather", "index_select")
_ADDS_ROWS = _packets("index_add_", "scatter_add_", "index_put_")


def _attention(first: int, causal: int, of_keys: int, of_values: int) -> Callable:
    """Return the formula of a fused operator of attention, whose key and value may have fewer heads than its query.

    Args:
        first, causal: numbers of the arguments query and is_causal; a causal one computes half of the scores.
        of_keys, of_values: products of the scores' size that sum over the size of a key, and of a value.
    """

    def flops(*args, **_unused) -> int:
        query, key, value = args[first : first + 3]
        scores = query.shape[:-1].numel() * key.shape[-2] // (2 if len(args) > causal and args[causal] else 1)
        return 2 * scores * (of_keys * key.shape[-1] + of_values * value.shape[-1])

    return flops


def _packed_attention(first: int, ends: int, of_keys: int, of_values: int) -> Callable:
    """Return the formula of a fused operator of attention over sequences [T, H, D] that are packed.

    Args:
        first, ends: numbers of the arguments query and cum_seq_q.
        of_keys, of_values: see ``_attention``.
    """

    def flops(*args, window_size_left: int | None = None, **_unused) -> int:
        query, _key, value = args[first : first + 3]
        lengths, seen = args[ends].diff().tolist(), math.inf if window_size_left is None else window_size_left + 1
        scores = sum(min(seen, n) * (2 * n - min(seen, n)) // 2 for n in lengths) * query.shape[1]
        return 2 * scores * (of_keys * query.shape[2] + of_values * value.shape[2])

    return flops


def _product(first: int) -> Callable:
    """Return the formula of a matrix product, or of several, whose factors begin with the argument of that number.

    It is torch's, without its look for tensors inside of every argument, which takes longer than all else here.
    """

    def flops(*args, **_unused) -> int:
        left, right = args[first : first + 2]
        return 2 * left.numel() * right.shape[-1]

    return flops


def of_this_torch(kernels: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return those of the kernels of attention whose operators there are: their names are torch's own, not promised."""
    ends = "", "_backward"
    return {
        name: numbers
        for name, numbers in kernels.items()
        if all(hasattr(_aten, f"_scaled_dot_product_{name}{end}") for end in ends)
    }


# The kernels of ``scaled_dot_product_attention``, and the number of the argument is_causal of the operators
# ``_scaled_dot_product_KERNEL`` and ``..._backward``. In a plan a CPU's stands for a GPU's.
FUSED_ATTENTION = of_this_torch(
    {
        "flash_attention": (4, 11),
        "efficient_attention": (6, 11),
        "cudnn_attention": (6, 14),
        "flash_attention_for_cpu": (4, 7),
    }
)
_PRODUCTS = [(_aten.mm, _aten.bmm, _aten._grouped_mm), (_aten.addmm, _aten.addmm_, _aten.baddbmm, _aten.baddbmm_)]
# FLOPs of an operator's call. torch's table lacks the operators that add to a tensor in place and a CPU's flash
# attention, counts what causal attention leaves out, and fails on grouped heads (torch 2.11).
FLOP_FORMULAS = flop_registry | {
    packet: _product(first) for first, packets in enumerate(_PRODUCTS) for packet in packets
}
for _name, (_forward, _backward) in FUSED_ATTENTION.items():
    # forward: scores, values; backward: the scores again, and the gradients of scores, value, query and key
    FLOP_FORMULAS[getattr(_aten, f"_scaled_dot_product_{_name}")] = _attention(0, _forward, 1, 1)
    FLOP_FORMULAS[getattr(_aten, f"_scaled_dot_product_{_name}_backward")] = _attention(1, _backward, 3, 2)
FLOP_FORMULAS[_aten._flash_attention_forward] = _packed_attention(0, 3, 1, 1)
FLOP_FORMULAS[_aten._flash_attention_backward] = _packed_attention(1, 6, 3, 2)


def _no_work(*_args, **_kwargs) -> int:
    return 0


@cache
def _formula(func) -> Callable | None:
    """Return an operator's formula, None if it only moves bytes, ``_no_work`` for views and memory alone."""
    if func.is_view or func._overloadpacket in _FREE:
        return _no_work
    return FLOP_FORMULAS.get(func._overloadpacket)


def moved_bytes(func, args: tuple, result) -> int:
    """Return the bytes that an operator without products reads and writes."""
    packet, read = func._overloadpacket, sum(_sizes(args))
    if packet in _ADDS_ROWS:
        *others, rows = _sizes(args[1:])
        return sum(others) + 3 * rows  # read, and added to as many that are read and written
    if packet in _FILLS:
        read -= args[0].nbytes
    elif packet in _GATHERS:
        read += result.nbytes - args[0].nbytes
    return read + sum(_sizes(result if isinstance(result, tuple | list) else (result,)))


def _sizes(values: Sequence) -> Iterator[int]:
    """Yield the bytes of the tensors among some values, and of those in lists there."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.nbytes
        elif isinstance(value, tuple | list):
            yield from (item.nbytes for item in value if isinstance(item, torch.Tensor))


def is_compiled(func, tensors: Sequence[torch.Tensor], flops: int) -> bool:
    """Return whether a CPU keeps a kernel that it compiled for a product of these shapes, or its attention."""
    if sum(tensor.nbytes for tensor in tensors) >= LARGE_BYTES:
        return True
    is_16_bit = tensors[0].dtype.itemsize == 2
    return is_16_bit and flops > 2 * COMPILED_16_BIT and any(func._overloadpacket in each for each in _PRODUCTS)


def _kinds(func, tensors: Sequence[torch.Tensor]) -> int:
    """Return of how many shapes a product's kernels may be: an expert may have any part of the rows."""
    if func._overloadpacket is not _aten._grouped_mm:
        return marks.kinds
    return tensors[0].shape[0 if tensors[1].dim() == 3 else 1]


class Work(NamedTuple):
    """FLOPs of products, bytes moved by everything else and over the bus, and operations, in training.

    ``operations`` are those of forward and backward (a micro-batch's) that are no views. ``compiled_products`` is how
    many products that a CPU compiles a kernel for differ in their operator or their shapes. ``disk_bytes`` are those of
    streamed weights, before they take the bus. ``link_bytes`` are those of sharded weights that come from other ranks.
    ``update_bytes`` are what moves once a step however many its micro-batches are: for the optimizer's update, and
    where weights are merged once (``memory.cache_merged``).
    """

    flops: int = 0
    moved_bytes: int = 0
    bus_bytes: int = 0
    operations: int = 0
    compiled_products: int = 0
    disk_bytes: int = 0
    link_bytes: int = 0
    update_bytes: int = 0


class WorkCounter:
    """Add up the work of the operations that it is shown, as a ``Ledger`` does with all that run."""

    def __init__(self):
        self._totals, self._beside = [0, 0, 0, 0, 0], {"on disk": 0, "on other ranks": 0}
        self._products: dict[tuple, int] = {}  # and how many shapes each stands for

    @property
    def work(self) -> Work:
        """Return what was counted since construction."""
        flops, moved, bus, operations, update = self._totals
        products = sum(self._products.values())
        return Work(
            flops, moved, bus, operations, products, self._beside["on disk"], self._beside["on other ranks"], update
        )

    def see(self, func, args: tuple, kwargs: dict, result) -> None:
        """Count an operation that has run."""
        if marks.phase == "load":
            return
        formula = _formula(func)
        if formula is _no_work:
            return
        if func is _COPY and marks.category in self._beside:  # by a thread, or as one operation: no work of the host's
            self._beside[marks.category] += marks.repeats * args[0].nbytes if marks.phase != "evaluation" else 0
            return
        totals = [0, 0, 0, 0, 0] if marks.phase == "evaluation" else self._totals
        is_once = marks.phase == "optimizer" or marks.is_once_a_step
        totals[3] += 0 if is_once else marks.repeats
        if func is _COPY and marks.category == "offloaded":
            totals[2] += marks.repeats * args[0].nbytes
        elif formula is not None and not marks.is_once_a_step:
            flops = formula(*args, **kwargs, out_val=result)
            totals[0] += marks.repeats * flops
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            if is_compiled(func, tensors, flops):
                product = (func, *(t.shape for t in tensors))
                self._products[product] = max(_kinds(func, tensors), self._products.get(product, 0))
        else:
            totals[4 if is_once else 1] += marks.repeats * moved_bytes(func, args, result)
