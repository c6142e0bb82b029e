"""The product of a gated MLP (SwiGLU), which keeps its two factors and nothing else for backward.

transformers writes ``silu(gate) * up`` in two operators, and autograd keeps ``silu(gate)`` too: 28 KiB a token of a
block of 8B. Here backward computes it again, with the same bits: a number takes 10 bytes forward and 22 backward in
bf16, against 10 and 18. Liger's kernels (arXiv 2410.10989) read and write each number once, 6 bytes and 10; they are
for a GPU, where a trial found them better (``train.kernels``).

Shapes: gate, up and their product [..., F].
Source: GLU variants, arXiv 2002.05202.
"""

import copy
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.memory.marks import repeated
from qlora_lite.memory.shapes import device_type
from qlora_lite.offload.around import Around, wrap_parts

_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # as every modelling file with the formula names them
_LIGERS_DEVICE = "cuda"  # where its kernels run
Tensors = tuple[torch.Tensor, ...]


class GatedMLP(Around):
    """An MLP that computes ``down(silu(gate(x)) * up(x))``.

    ``fused`` allows Liger's kernels on a GPU; see ``models.kernels``.
    """

    fused = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's value, shaped as x."""
        if torch.compiler.is_compiling():
            return self.inner(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.fused))


def gated(gate: torch.Tensor, up: torch.Tensor, fused: bool = False) -> torch.Tensor:
    """Return ``silu(gate) * up``; on a GPU with Liger's kernels if ``fused``, which write gradients over both."""
    if fused and gate.device.type == _LIGERS_DEVICE:
        return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(gate, up)
    return _Gated.apply(gate, up, fused and device_type(gate.device) == "cuda")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, fused):
        ctx.save_for_backward(gate, up)
        ctx.fused = fused

        def compute() -> Tensors:
            return (functional.silu(gate).mul_(up),)

        return (planned_kernel(compute, (gate, up)) if fused else compute())[0]

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors

        def compute() -> Tensors:
            grad_up = functional.silu(gate).mul_(grad)
            grad_gate = grad * up
            return torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate), grad_up

        return *(planned_kernel(compute, (grad, gate, up)) if ctx.fused else compute()), None


def planned_kernel(compute: Callable[[], Tensors], inputs: Sequence[torch.Tensor]) -> Tensors:
    """Return ``compute()`` with the memory of its operators and the work of one that reads and writes each number once.

    Whether a run takes the kernel is found out before its first step (``train.kernels``), and memory must do either
    way.

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


def use_lean_mlps(model: nn.Module) -> None:
    """Put a ``GatedMLP`` in the place of each MLP of a model that computes its formula."""

    def lean(part: nn.Module) -> GatedMLP | None:
        has_parts = {child for child, _ in part.named_children()} == _PARTS
        return GatedMLP(part) if has_parts and _is_gated(part) else None

    wrap_parts(model, lean)


def _is_gated(mlp: nn.Module) -> bool:
    """Return whether an MLP computes the formula, bit for bit, with small layers in the place of its own.

    Of large numbers too, which some clamp, and in bfloat16, where some multiply in float32.
    """
    twin, (inside, outside) = copy.copy(mlp), (6, 4)
    with torch.random.fork_rng(devices=[]):
        layers = {name: nn.Linear(outside, inside) for name in ("gate_proj", "up_proj")}
        layers["down_proj"] = nn.Linear(inside, outside)
        x = torch.randn(16, outside)
    twin._modules = {**layers, "act_fn": mlp.act_fn}
    for dtype in (torch.float32, torch.bfloat16):
        gate, up, down = (layer.to(dtype) for layer in layers.values())
        for given in (x.to(dtype), 1e4 * x.to(dtype)):
            with torch.no_grad():
                if not torch.equal(twin(given), down(functional.silu(gate(given)) * up(given))):
                    return False
    return True
