"""LoRA that learns the norm of each row of the adapted weight by itself: DoRA.

    V = W + scale * B A,      y = x (m / |V| * V)^T + bias,      |V| [out] the L2 norms of the rows of V

The magnitudes m start as the norms of W, so that the first forward equals the base model's; they are in float32
whatever the type of A and B. |V| follows A and B and is a constant in backward (section 4.3 of the paper).

V is never formed. Its norms are sums over factors,

    |V|^2 = |W|^2 + 2 scale rowsum((W A^T) * B) + scale^2 rowsum((B (A A^T)) * B),

with |W|^2 computed once and W A^T as dear as r tokens, and x V^T is ``LoraLinear``'s. (peft multiplies an identity
matrix of W's width to form B A, and holds three matrices of W's shape.) The factor m / |V| is close to 1 and is applied
to z = x V^T as z + (m / |V| - 1) z, so that 16 bits are spent on its distance from 1.

For m's gradient z stays until backward, or y: of a layer with more outputs than inputs, the next operation keeps y
anyway (an activation, a product of gates). The outputs of others are mostly added to the residual stream, by some
models in place.

Shapes: x [..., in], W [out, in], A [r, in], B [out, r], m [out], y [..., out].
Source: DoRA, arXiv 2402.09353, sections 4.1 and 4.3; norms by factors: arXiv 2603.22276.
"""

import torch
from torch import nn

from qlora_lite.offload.checkpoint import kept_result
from qlora_lite.quant.linear import frozen_weight, squared_row_norms
from qlora_lite.quant.product import FrozenMatmul, product

from .layer import LoraLinear

SMALLEST = torch.finfo(torch.float32).tiny  # squared norm of a row of zeros, which stays one


def adapted_norms(
    base: nn.Module, squares: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return the norms of the rows of ``W + scale * B A``, float32 [out], without gradients.

    Args:
        base: the layer with the frozen weight.
        squares: ``squared_row_norms`` of it.
        dtype: that W A^T is computed in.
    """
    with torch.no_grad():
        spec, frozen = frozen_weight(base)
        factor_a, factor_b = lora_a.detach().to(dtype), lora_b.detach().to(dtype)
        crossed = product(factor_a, spec, frozen).float()
        factor_a, factor_b = factor_a.float(), factor_b.float()
        grown = (crossed.t() * factor_b).sum(1).mul_(2 * scale)
        grown += (factor_b @ (factor_a @ factor_a.t()) * factor_b).sum(1).mul_(scale**2)
        return grown.add_(squares).clamp_(min=SMALLEST).sqrt_()


def excess_of(magnitude: torch.Tensor, norms: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``m / |V| - 1``, computed in float32."""
    return (magnitude.float() / norms - 1).to(dtype)


class _WithMagnitude(torch.autograd.Function):
    """Compute ``m / |V| * z + bias``, with gradients for z and m; keep y, which has no bias then, or z."""

    @staticmethod
    def forward(ctx, z, magnitude, norms, bias, keeps_y):
        excess = excess_of(magnitude, norms, z.dtype)
        y = torch.addcmul(z, z, excess)
        ctx.keeps_y = keeps_y
        ctx.save_for_backward(excess, magnitude, norms, y if keeps_y else z)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad_y):
        excess, magnitude, norms, kept = ctx.saved_tensors
        along = (grad_y * kept).reshape(-1, kept.shape[-1]).sum(0)
        divisor = torch.where(magnitude == 0, 1, magnitude) if ctx.keeps_y else norms
        return torch.addcmul(grad_y, grad_y, excess), along.to(magnitude.dtype) / divisor, None, None, None


class DoraLinear(LoraLinear):
    """Wrap a frozen linear layer with LoRA weights and the magnitudes ``lora_magnitude_vector`` [out], float32.

    The arguments are those of ``LoraLinear``. With dropout the magnitude is that of the dropped input's product, as in
    peft, which costs a second product with the frozen weight.
    """

    squares: torch.Tensor

    def __init__(self, base, rank, alpha, dropout, rslora, dtype):
        super().__init__(base, rank, alpha, dropout, rslora, dtype)
        self.register_buffer("squares", squared_row_norms(base), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.squares.clamp(min=SMALLEST).sqrt())
        self._found: tuple[object, torch.Tensor] | None = None

    def train(self, mode: bool = True) -> "DoraLinear":
        """Set the mode, and forget the norms that were found in evaluation."""
        self._found = None
        return super().train(mode)

    def norms(self, dtype: torch.dtype) -> torch.Tensor:
        """Return |V|, float32 [out]: once for a block's forward and its recomputation, and once for an evaluation."""
        if self.training or torch.is_grad_enabled():
            return kept_result(lambda: self._compute_norms(dtype))
        key = dtype, *((factor.data_ptr(), factor._version) for factor in (self.lora_A, self.lora_B))
        if self._found is None or self._found[0] != key:
            self._found = key, self._compute_norms(dtype)
        return self._found[1]

    def _compute_norms(self, dtype: torch.dtype) -> torch.Tensor:
        is_late = self.squares.is_meta and not self.lora_A.is_meta  # the weight is there for the forward alone
        squares = squared_row_norms(self.base) if is_late else self.squares
        return adapted_norms(self.base, squares, self.lora_A, self.lora_B, self.scale, dtype)

    def adapted_product(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """Return y by the fused path; without dropout."""
        norms, z = self.norms(x.dtype), super().adapted_product(x, with_bias=False)
        bias: torch.Tensor | None = self.base.bias if with_bias else None
        keeps_y = bias is None and z.shape[-1] > x.shape[-1]
        return _WithMagnitude.apply(z, self.lora_magnitude_vector, norms, bias, keeps_y)

    def by_autograd(self, x: torch.Tensor, branch: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """See ``LoraLinear``."""
        update, (spec, frozen) = self.update(branch), frozen_weight(self.base)
        bias = self.base.bias if with_bias else None
        excess = excess_of(self.lora_magnitude_vector, self.norms(x.dtype), x.dtype)
        of_branch = FrozenMatmul.apply(branch, update, None, spec, *frozen)
        return FrozenMatmul.apply(x, torch.addcmul(update, of_branch, excess), bias, spec, *frozen)
