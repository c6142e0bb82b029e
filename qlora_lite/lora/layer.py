"""A frozen linear layer with trainable low-rank factors beside it.

    y = x W^T + bias + scale * (x A^T) B^T,      scale = alpha / r   (or alpha / sqrt(r), rank-stabilised)

A starts Kaiming-uniform and B at zero, so that the first forward equals the base model's.

The low-rank part is formed first and the base product accumulates onto it (no second [T, out] tensor, one
rounding: see ``quant.linear.add_product``). x, x A^T and the *packed* weight are saved, and the weight is
dequantised again in backward. Saving and multiplying are two autograd functions, so that a checkpointed
block's second run can leave out its last product (``down_proj``; see ``ops.checkpoint``). With dropout the
low-rank branch has its own input, so plain autograd is used around the same frozen product. ``reference=True``
computes the formula with plain autograd; it is the oracle of the fast path.

Shapes: x [..., in], A [r, in], B [out, r], y [..., out]; T is the product of x's leading dimensions.
Source: LoRA, arXiv 2106.09685, section 4.1; rank-stabilised scale: arXiv 2312.03732; QLoRA: arXiv 2305.14314.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.ops.checkpoint import product_or_stand_in
from qlora_lite.quant.linear import FrozenMatmul, add_product, frozen_weight, kept_for, materialize, product_of_few


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def lora_matmul(x, lora_a, lora_b, bias, scale, spec, frozen) -> torch.Tensor:
    """Compute ``x W^T + bias + scale * (x A^T) B^T`` with gradients for x, A and B."""
    kept = kept_for(x)
    low, gradient = _LoraGradient.apply(x, lora_a, lora_b, scale, spec, kept, *frozen)
    return product_or_stand_in(
        lambda: _LoraProduct.apply(gradient, low, x.detach(), lora_b.detach(), bias, spec, kept, *frozen), gradient
    )


class _LoraGradient(torch.autograd.Function):
    """Compute ``low = scale * x A^T`` and take the gradients of the whole layer.

    The second result stands for y in the graph: it has y's shape, no memory and no values, and what arrives as
    its gradient is y's.
    """

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, scale, spec, kept, *frozen):
        rows = x.reshape(-1, x.shape[-1])
        low = functional.linear(rows, lora_a.to(x.dtype)).mul_(scale)
        ctx.scale, ctx.spec, ctx.kept = scale, spec, kept
        ctx.save_for_backward(rows, low, lora_a, lora_b, *frozen)
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        return low, x.new_empty(()).expand(*x.shape[:-1], spec.shape[0])

    @staticmethod
    def backward(ctx, _grad_low, grad_y):
        rows, low, lora_a, lora_b, *frozen = ctx.saved_tensors
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        grad_low = (grad_rows @ lora_b.to(grad_y.dtype)).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ lora_a.to(grad_y.dtype)
            grad_x.addmm_(grad_rows, materialize(ctx.spec, tuple(frozen), grad_y.dtype, ctx.kept))
            grad_x = grad_x.view(*grad_y.shape[:-1], grad_x.shape[-1])
        grad_a = (grad_low.t() @ rows).to(lora_a.dtype)
        grad_b = (grad_rows.t() @ low).to(lora_b.dtype)
        return grad_x, grad_a, grad_b, None, None, None, *(None for _ in frozen)


class _LoraProduct(torch.autograd.Function):
    """Compute ``x W^T + bias + low B^T``; save nothing and hand y's gradient on to ``_LoraGradient``."""

    @staticmethod
    def forward(ctx, gradient, low, x, lora_b, bias, spec, kept, *frozen):
        y = functional.linear(low.view(*x.shape[:-1], low.shape[-1]), lora_b.to(x.dtype))
        return add_product(y, x, materialize(spec, frozen, x.dtype, kept, again=True), bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, *(None for _ in ctx.needs_input_grad[1:])


class LoraLinear(nn.Module):
    """Wrap a frozen linear layer with the factors ``lora_A`` [r, in] and ``lora_B`` [out, r].

    Args:
        base: ``QuantLinear``, ``nn.Linear`` or ``Conv1D``; its parameters are frozen here.
        rank: r, at least 1.
        alpha: numerator of the scale.
        dropout: probability of dropping an input of the low-rank branch while training, in [0, 1).
        rslora: divide alpha by sqrt(r) instead of r.
        dtype: of the factors.
        reference: compute with plain autograd.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, rslora=False, dtype=torch.bfloat16, reference=False):
        super().__init__()
        self.base = base.requires_grad_(False)
        (out_features, in_features), device = frozen_weight(base)[0].shape, base.weight.device
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = lora_scale(alpha, rank, rslora)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.reference = reference
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from U(-1/sqrt(in), 1/sqrt(in)), the Kaiming-uniform bound with a = sqrt(5), and zero B.

        Drawn in host memory, so that a seed gives the same factors wherever the layer lies.
        """
        if self.lora_A.is_meta:
            return
        drawn = nn.init.kaiming_uniform_(torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype), a=math.sqrt(5))
        self.lora_A.data.copy_(drawn)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec, frozen = frozen_weight(self.base)
        dropping = self.training and self.dropout > 0
        if not dropping and not self.reference:
            y = product_of_few(self.base, x)
            if y is not None:
                low = functional.linear(x, self.lora_A.to(x.dtype)).mul_(self.scale)
                return y.add_(functional.linear(low, self.lora_B.to(x.dtype)))
            return lora_matmul(x, self.lora_A, self.lora_B, self.base.bias, self.scale, spec, frozen)
        branch = functional.dropout(x, self.dropout, self.training)
        low = self.scale * functional.linear(branch, self.lora_A.to(x.dtype))
        update = functional.linear(low, self.lora_B.to(x.dtype))
        return FrozenMatmul.apply(x, update, self.base.bias, spec, *frozen)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}, rslora={self.rslora}"
