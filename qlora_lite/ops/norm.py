"""The gradient of an RMS norm, from its input alone.

transformers writes RMS norms out in single operators, and autograd goes back through each of them: it keeps the input
once more in float32, and rounds on the way. Here the value is the module's own, its input is kept as it is, and the
gradient is taken by the formula, in float32:

    y = gain * n,   n = x / rms,   rms = sqrt(mean(x^2) + eps)
    dx = (g - n * mean(g * n)) / rms,   g = gain * dy

Shapes: x, y [..., D]; gain [D], which is the weight or, in the Gemma family, one more.
Source: root mean square layer normalization, arXiv 1910.07467.
"""

import copy
import inspect

import torch
from torch import nn

from .around import Around

OFFSETS = (0.0, 1.0)  # from a weight to its gain
PROBE_SIZE = 1e-3  # of inputs whose mean square is not far from eps


class LeanNorm(Around):
    """An RMS norm whose gradient needs its input only; its weight is frozen.

    Args:
        inner: the model's own norm.
        offset: from its weight to its gain; see ``gain_offset``.
    """

    def __init__(self, inner: nn.Module, offset: float):
        super().__init__(inner)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = self.weight.requires_grad or torch.compiler.is_compiling()  # a compiler finds out what to keep
        if plain or not (x.requires_grad and torch.is_grad_enabled()):
            return self.inner(x)
        return _RmsNorm.apply(x, self.weight, self.inner, self.offset)


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


def _gradient(x, gain, eps: float, grad_y) -> torch.Tensor:
    normed = x.to(torch.float32, copy=True)
    one_over_rms = (torch.linalg.vecdot(normed, normed) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)
    normed.mul_(one_over_rms)
    scaled = grad_y.to(torch.float32, copy=True).mul_(gain)
    shared = torch.linalg.vecdot(scaled, normed).div_(-x.shape[-1]).unsqueeze(-1)
    return scaled.addcmul_(normed, shared).mul_(one_over_rms).to(x.dtype)


def use_lean_norms(model: nn.Module) -> None:
    """Put a ``LeanNorm`` in the place of each RMS norm of a model."""
    offsets: dict[type, float | None] = {}
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if _may_be_rms_norm(part):
                if type(part) not in offsets:
                    offsets[type(part)] = gain_offset(part)
                if offsets[type(part)] is not None:
                    setattr(module, name, LeanNorm(part, offsets[type(part)]))


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
