"""Keep what a fused attention kernel gives from the first run of a checkpointed block for its second.

Forward, attention costs the square of a row's length, and its result is one hidden-sized tensor beside one number for
each token and head (the log-sum-exp of the scores, from which backward builds the weights again; flex attention gives
the result alone). With them kept, the recomputation does not compute it again: the kernel's operator returns what was
kept, below autograd, so that the operator's own backward runs on the same numbers.

What torch chooses a kernel for is seen where it runs: a dispatch mode around the call meets the operator. Where none
of those known here runs (torch has only the formula for some shapes), nothing is kept, and the recomputation computes.

Source: ``torch.utils.checkpoint.create_selective_checkpoint_contexts``, whose kept tensors cannot go to host memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.memory.work import FUSED_ATTENTION
from qlora_lite.offload.checkpoint import Run, present_run

from .flex_attention import VALUES

FUSED = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}") for kernel in FUSED_ATTENTION}
FUSED |= {torch.ops.aten._flash_attention_forward, VALUES}


class FusedCall(NamedTuple):
    """An operator that ran, how many of its results are kept, and those behind them: numbers, and the few bytes of a
    random state."""

    operator: torch._ops.OpOverload
    tensors: int
    others: tuple


def kept_attention(attend: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return ``attend(*inputs)``, in a block's recomputation from what its first run kept.

    Args:
        attend: has no dropout and calls at most one fused operator.
        inputs: query, key and value.
    """
    run = present_run()
    if run is None or run.attention is None:
        return attend(*inputs)
    if run.is_first:
        return _first(run, run.attention, attend, inputs)
    with _Returning(run):
        return attend(*inputs)


def _first(run: Run, calls: list[FusedCall | None], attend: Callable[..., torch.Tensor], inputs) -> torch.Tensor:
    """Attend as in the recomputation, which wants gradients: torch may choose a kernel by that, and what it gives."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    nothing_saved = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None)  # nobody goes back here
    with torch.enable_grad(), nothing_saved, _Keeping(run) as seen:
        out = attend(*inputs)
    calls.append(seen.call)
    return out.detach()


class _Keeping(TorchDispatchMode):
    """Keep the results of the fused operator that runs below it."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run
        self.call: FusedCall | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.overloadpacket in FUSED:
            tensors, others = ((results,), ()) if isinstance(results, torch.Tensor) else (results[:2], results[2:])
            self.run.kept += [tensor.detach() for tensor in tensors]
            self.call = FusedCall(func, len(tensors), others)
        return results


class _Returning(TorchDispatchMode):
    """Return the results that a run's next call of attention kept, in place of running its operator."""

    def __init__(self, run: Run):
        super().__init__()
        self.call = run.next_attention()
        self.tensors = [run.next_result() for _ in range(self.call.tensors)] if self.call else []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.call is not None and func is self.call.operator:
            results = *(tensor.detach() for tensor in self.tensors), *self.call.others
            return results if len(results) > 1 else results[0]
        return func(*args, **(kwargs or {}))
