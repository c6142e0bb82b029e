"""The gradient of an RMS norm, from its input alone.

transformers writes RMS norms out in single operators, and autograd goes back through each of them: it keeps the input
once more in float32, and rounds on the way. Here the value is the module's own, its input is kept as it is, and the
gradient is taken by the formula, in float32. A GPU has torch's fused kernels in their place, which read and write each
number once: 4 bytes a number in bf16 forward and 6 backward, against 36 and 90. The formula:

    y = gain * n,   n = x / rms,   rms = sqrt(mean(x^2) + eps)
    dx = (g - n * mean(g * n)) / rms,   g = gain * dy

Shapes: x, y [..., D]; gain [D], which is the weight or, in the Gemma family, one more.
Source: root mean square layer normalization, arXiv 1910.07467.
"""

import copy
import inspect

import torch
from torch import nn

from qlora_lite.memory.shapes import on_gpu
from qlora_lite.offload.around import Around, wrap_parts

# read for torch 2.11 to 2.13; a CPU has no kernel for the second
_FUSED, _FUSED_BACKWARD = torch.ops.aten._fused_rms_norm, torch.ops.aten._fused_rms_norm_backward
OFFSETS = (0.0, 1.0)  # from a weight to its gain
PROBE_SIZE = 1e-3  # of inputs whose mean square is not far from eps


class LeanNorm(Around):
    """An RMS norm whose gradient needs its input only; its weight is frozen.

    Args:
        inner: the model's own norm.
        offset: from its weight to its gain; see ``gain_offset``.

    ``fused`` allows a GPU's kernels; see ``models.kernels``.
    """

    fused = False

    def __init__(self, inner: nn.Module, offset: float):
        super().__init__(inner)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad or torch.compiler.is_compiling():  # a compiler finds out what to keep
            return self.inner(x)
        fused = self.fused and _kernels_take(x, self.weight)
        if x.requires_grad and torch.is_grad_enabled():
            return (_FusedRmsNorm if fused else _RmsNorm).apply(x, self.weight, self.inner, self.offset)
        return _fused_value(x, self.weight, self.inner)[0] if fused and not self.offset else self.inner(x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, inner, offset):
        ctx.offset, ctx.eps = offset, _eps(inner)
        ctx.save_for_backward(x, weight)
        return inner(x)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        return _gradient(x, weight.float() + ctx.offset, ctx.eps, grad_y), None, None, None


class _FusedRmsNorm(torch.autograd.Function):
    """The same by torch's kernels.

    They multiply by the weight itself, in its type. One more than it, in float32, has more digits than that: there the
    value is the module's own, and the gradient is multiplied by the gain before.
    """

    @staticmethod
    def forward(ctx, x, weight, inner, offset):
        ctx.offset, ctx.eps = offset, _eps(inner)
        y, one_over_rms = (inner(x), None) if offset else _fused_value(x, weight, inner)
        ctx.save_for_backward(x, weight, one_over_rms)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, one_over_rms = ctx.saved_tensors
        x, grad_y = x.contiguous(), grad_y.contiguous()  # which the kernel would see to
        if ctx.offset:
            grad_y, weight = torch.addcmul(grad_y, grad_y, weight, value=ctx.offset), None
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            one_over_rms = norm.square_().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()
        grad_x, _ = _FUSED_BACKWARD(grad_y, x, [x.shape[-1]], one_over_rms, weight, [True, False])
        return grad_x, None, None, None


def _kernels_take(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype and on_gpu(x)


def _fused_value(x, weight, inner: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a norm's value in one kernel, and 1 / rms [..., 1] in float32."""
    x = x.contiguous()
    if x.is_meta:  # torch has no kernel, and the formula in its place; a product reads and writes as much as one does
        return x * weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return _FUSED(x, [x.shape[-1]], weight, _eps(inner))


def _gradient(x, gain, eps: float, grad_y) -> torch.Tensor:
    normed = x.to(torch.float32, copy=True)
    one_over_rms = (torch.linalg.vecdot(normed, normed) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)
    normed.mul_(one_over_rms)
    scaled = grad_y.to(torch.float32, copy=True).mul_(gain)
    shared = torch.linalg.vecdot(scaled, normed).div_(-x.shape[-1]).unsqueeze(-1)
    return scaled.addcmul_(normed, shared).mul_(one_over_rms).to(x.dtype)


def exact_norm(norm: LeanNorm, x: torch.Tensor) -> torch.Tensor:
    """Return a norm's value by the formula, in the type of x."""
    one_over_rms = (x.square().mean(-1, keepdim=True) + _eps(norm.inner)).rsqrt()
    return (norm.weight.to(x.dtype) + norm.offset) * x * one_over_rms


def use_lean_norms(model: nn.Module) -> None:
    """Put a ``LeanNorm`` in the place of each RMS norm of a model."""
    offsets: dict[type, float | None] = {}

    def lean(part: nn.Module) -> LeanNorm | None:
        if not _may_be_rms_norm(part):
            return None
        if type(part) not in offsets:
            offsets[type(part)] = gain_offset(part)
        offset = offsets[type(part)]
        return None if offset is None else LeanNorm(part, offset)

    wrap_parts(model, lean)


def _may_be_rms_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    takes_one = "RMSNorm" in type(module).__name__ and len(inspect.signature(module.forward).parameters) == 1
    return takes_one and list(parameters) == ["weight"] and parameters["weight"].ndim == 1 and _eps(module) is not None


def _eps(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def gain_offset(norm: nn.Module) -> float | None:
    """Return what is added to a norm's weight to get its gain, or None if it is not the RMS norm of this formula.

    A copy of the norm is tried on random numbers; nothing is read from its weight, which may be on the meta device.
    """
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(norm).to_empty(device="cpu").float()
    twin.weight.data.normal_(generator=generator)
    x = PROBE_SIZE * torch.randn(3, len(twin.weight), generator=generator)
    with torch.no_grad():
        found = twin(x)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _eps(norm))
    return next((offset for offset in OFFSETS if torch.allclose(found, normed * (twin.weight + offset))), None)
