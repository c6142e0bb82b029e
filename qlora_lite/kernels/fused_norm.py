"""What torch's fused kernel of RMSNorm holds on a GPU, for plans: of tensors without values torch takes the formula.

    y = x * rstd * weight,      rstd = 1 / sqrt(mean(x^2) + eps)

The formula saves x in float32 several times; the kernel saves x as it is, and rstd. Source: rms_norm in torch's
layer_norm.cpp, which calls ``_fused_rms_norm`` where torch has it, and what that allocates on a simulated GPU
(``tools/check/denoisers``).
"""

import torch

from qlora_lite.memory.shapes import on_gpu

_HAS_KERNEL = hasattr(torch.ops.aten, "_fused_rms_norm")


class _PlannedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, dimensions):
        x_in_order = x.contiguous()  # a copy, where it is a part of something
        out = torch.empty_like(x_in_order)
        rstd = x.new_empty((*x.shape[: x.dim() - dimensions], *(1,) * dimensions), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        x_in_order, grad = x.contiguous(), grad.contiguous()
        learns = weight is not None and ctx.needs_input_grad[1]
        return torch.empty_like(x_in_order), torch.empty_like(weight) if learns else None, None


def planned_rms_norm(x, normalized_shape, weight=None, eps=None) -> torch.Tensor:
    """Return what ``torch.rms_norm`` does of a plan's tensors, with the memory that a GPU takes for it."""
    fits = weight is None or weight.dtype == x.dtype
    if not (_HAS_KERNEL and x.is_meta and on_gpu(x) and fits):
        return torch.rms_norm(x, normalized_shape, weight, eps)
    return _PlannedNorm.apply(x, weight, len(normalized_shape))
