"""Count what a step computes and moves, for an estimate of its time.

Two totals are enough for a ranking of plans: floating-point operations of matrix products and attention (by
torch's own formulas) and bytes that all other operations read and write. Dequantising a weight is such an
operation: it reads half a byte and writes two.
"""

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .marks import marks

_DEVICE_OF = torch.ops.prim.device.default


class Work(NamedTuple):
    """FLOPs of products and bytes moved by everything else, in training and in evaluation."""

    flops: int = 0
    moved_bytes: int = 0
    eval_flops: int = 0
    eval_moved_bytes: int = 0

    def continued(self, deeper: "Work", steps: int) -> "Work":
        """Return ``self + steps * (deeper - self)``, number by number."""
        return Work(*(a + (b - a) * steps for a, b in zip(self, deeper, strict=True)))


class WorkCounter(TorchDispatchMode):
    """Add up the work of all operations while it is the active mode."""

    def __init__(self):
        super().__init__()
        self._totals = {True: [0, 0], False: [0, 0]}

    @property
    def work(self) -> Work:
        """Return what was counted since construction."""
        return Work(*self._totals[False], *self._totals[True])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _DEVICE_OF and hasattr(args[0], "fake_device"):
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        if marks.phase == "load":
            return result
        totals = self._totals[marks.phase == "evaluation"]
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            totals[0] += formula(*args, **(kwargs or {}), out_val=result)
        elif not func.is_view:
            outputs = result if isinstance(result, tuple | list) else (result,)
            totals[1] += sum(t.nbytes for t in (*args, *outputs) if isinstance(t, torch.Tensor))
        return result
