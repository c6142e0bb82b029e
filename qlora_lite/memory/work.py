"""Count what a step computes and moves, for an estimate of its time.

Three totals are enough for a ranking of plans: floating-point operations of matrix products and attention (by
torch's own formulas), bytes that all other operations read and write (dequantising a weight reads half a byte and
writes two), and bytes that travel between device and host. Beside them, how many large products differ: a CPU compiles
a kernel for each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .marks import marks

LARGE_BYTES = 1 << 17  # of a product's operands and result
_COPY = torch.ops.aten.copy_.default


def _of_what_is_seen(formula: Callable, causal: int) -> Callable:
    """Halve a formula where tokens see only what came before them; argument number ``causal`` says so."""

    def flops(*args, **kwargs) -> int:
        return formula(*args, **kwargs) // (2 if len(args) > causal and args[causal] else 1)

    return flops


_aten = torch.ops.aten
# FLOPs of an operator's call. torch's table lacks the operators that add to a tensor in place, and a CPU's flash
# attention, which in a plan stands for a card's and like it leaves out what is not seen.
FLOP_FORMULAS = flop_registry | {
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: _of_what_is_seen(
        flop_registry[_aten._scaled_dot_product_flash_attention], causal=4
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_what_is_seen(
        flop_registry[_aten._scaled_dot_product_flash_attention_backward], causal=7
    ),
}


class Work(NamedTuple):
    """FLOPs of products, bytes moved by everything else and over the bus, in training and in evaluation.

    ``large_products`` is how many products of ``LARGE_BYTES`` or more differ in their operator or their shapes.
    """

    flops: int = 0
    moved_bytes: int = 0
    bus_bytes: int = 0
    eval_flops: int = 0
    eval_moved_bytes: int = 0
    eval_bus_bytes: int = 0
    large_products: int = 0


class WorkCounter(TorchDispatchMode):
    """Add up the work of all operations while it is the active mode."""

    def __init__(self):
        super().__init__()
        self._totals = {True: [0, 0, 0], False: [0, 0, 0]}
        self._products: set[tuple] = set()

    @property
    def work(self) -> Work:
        """Return what was counted since construction."""
        return Work(*self._totals[False], *self._totals[True], len(self._products))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.see(func, args, kwargs or {}, result)
        return result

    def see(self, func, args: tuple, kwargs: dict, result) -> None:
        """Count an operation that has run."""
        if marks.phase == "load":
            return
        totals = self._totals[marks.phase == "evaluation"]
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if func is _COPY and marks.category == "offloaded":
            totals[2] += marks.repeats * args[0].nbytes
        elif formula is not None:
            totals[0] += marks.repeats * formula(*args, **kwargs, out_val=result)
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            if sum(t.nbytes for t in tensors) >= LARGE_BYTES:
                self._products.add((func, *(t.shape for t in tensors)))
        elif not func.is_view:
            outputs = result if isinstance(result, tuple | list) else (result,)
            totals[1] += marks.repeats * sum(t.nbytes for t in (*args, *outputs) if isinstance(t, torch.Tensor))
