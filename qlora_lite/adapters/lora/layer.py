"""A frozen linear layer with trainable low-rank factors beside it.

    y = x W^T + bias + scale * (x A^T) B^T,      scale = alpha / r   (or alpha / sqrt(r), rank-stabilised)

A starts Kaiming-uniform and B at zero, so that the first forward equals the base model's.

The low-rank part is formed first and the base product accumulates onto it (no second [T, out] tensor, one
rounding: see ``quant.product.add_product``). x, x A^T and the *packed* weight are saved, and the weight is
dequantised again in backward. Saving and multiplying are two autograd functions, so that a checkpointed
block's recomputation can leave out its last product (``down_proj``; see ``offload.checkpoint``). Layers with the same
input can be begun together (``shared``). With dropout the low-rank branch has its own input, so plain autograd is used
around the same frozen product.

Shapes: x [..., in], A [r, in], B [out, r], y [..., out]; T is the product of x's leading dimensions.
Source: LoRA, arXiv 2106.09685, section 4.1; rank-stabilised scale: arXiv 2312.03732; QLoRA: arXiv 2305.14314.
"""

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import Projection
from qlora_lite.memory.shapes import on_gpu
from qlora_lite.offload.checkpoint import product_or_placeholder
from qlora_lite.quant.linear import frozen_weight, small_batch_product
from qlora_lite.quant.merging import GGUF, NF4, Merging
from qlora_lite.quant.product import (
    FrozenMatmul,
    KeptWeights,
    WeightSpec,
    add_product,
    kept_for,
    merged,
    product,
    product_beside,
)


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """Return ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def merging_of(layer: nn.Module, to: str, scale: float, path: str) -> Merging | None:
    """Return how the update of a linear layer is merged into its weight; None where it stays beside it.

    Args:
        layer: without LoRA weights, on any device.
        to: see ``inject.add_lora``; a layer that is in 16 bit beside NF4 ones stays so.
        scale: of the update.
        path: of the layer in the model.
    """
    is_merged = to in GGUF or (to == NF4 and frozen_weight(layer)[0].quant_type == NF4)
    return Merging(to, scale, path) if is_merged else None


def add_update(y, x, lora_a, lora_b, scale: float) -> torch.Tensor:
    """Add ``scale * (x A^T) B^T`` to y [..., out] in place, without gradients, and return it.

    Two operations: what a token of an answer costs is how many it takes. The scale is taken in the second, in the
    accuracy of its sums.
    """
    low = functional.linear(x, lora_a.to(x.dtype))
    y.view(-1, y.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), lora_b.to(x.dtype).t(), alpha=scale)
    return y


def no_weight(path: str) -> ModelError:
    """Return the error of an architecture that reads the weight of an adapted layer itself, past its LoRA weights."""
    return ModelError(
        f"this architecture reads the weight of {path} itself, past the LoRA weights: leave it out of lora.targets"
    )


class Begun(NamedTuple):
    """Products of LoRA layers with one input x, begun by ``begin`` and each ended by ``end``.

    Of each layer: low [T, r], a placeholder for y, and its frozen weight. ``kept`` is where dequantised weights are
    found, and ``merged`` where backward finds what forward has merged, by number.
    """

    x: torch.Tensor
    kept: KeptWeights | None
    low: Sequence[torch.Tensor]
    placeholders: Sequence[torch.Tensor]
    weights: Sequence[tuple[WeightSpec, tuple[torch.Tensor, ...]]]
    merged: dict[int, tuple[WeightSpec, tuple[torch.Tensor, ...]]]


def begin(x: torch.Tensor, layers: Sequence["LoraLinear"]) -> Begun:
    """Begin the products of x with layers of one scale: their low-rank parts, and their place in the graph."""
    weights, kept = [layer.described for layer in layers], kept_for(x)
    specs, counts = [spec for spec, _ in weights], [len(frozen) for _, frozen in weights]
    tensors = [
        *(layer.lora_A for layer in layers),
        *(layer.lora_B for layer in layers),
        *(tensor for _, frozen in weights for tensor in frozen),
    ]
    merged: dict[int, tuple[WeightSpec, tuple[torch.Tensor, ...]]] = {}
    low, *placeholders = _LoraGradient.apply(x, layers[0].scale, specs, counts, kept, merged, *tensors)
    return Begun(x, kept, low.chunk(len(layers), dim=1), placeholders, weights, merged)


def end(layer: "LoraLinear", begun: Begun, number: int, with_bias: bool = True) -> torch.Tensor:
    """Return ``x W^T + bias + scale * (x A^T) B^T``, with gradients for x, A and B.

    Args:
        number: of the layer, among those that were begun together.
    """
    placeholder, low, (spec, frozen) = begun.placeholders[number], begun.low[number], begun.weights[number]
    factor, bias = layer.lora_B.detach(), layer.base.bias if with_bias else None
    if spec.merging is not None:
        low = factor = None
        if layer.merged is not None or begun.kept is None:
            spec, frozen = layer.merged or merged(spec, frozen)
            if placeholder.requires_grad:
                begun.merged[number] = spec, frozen
    inputs = placeholder, low, begun.x.detach(), factor, bias
    return product_or_placeholder(lambda: _LoraProduct.apply(*inputs, spec, begun.kept, *frozen), placeholder)


class _LoraGradient(torch.autograd.Function):
    """Compute ``low = scale * x A^T`` of all layers, and take the gradients of the whole of them.

    The other results stand for the layers' y in the graph: they have y's shape, no memory and no values, and what
    arrives as their gradient is y's; None, where nobody used one.
    """

    @staticmethod
    def forward(ctx, x, scale, specs, counts, kept, merged, *tensors):
        rows = x.reshape(-1, x.shape[-1])
        low = functional.linear(rows, _joined(tensors[: len(specs)], 0, x.dtype)).mul_(scale)
        ctx.scale, ctx.specs, ctx.counts, ctx.kept, ctx.merged = scale, specs, counts, kept, merged
        ctx.save_for_backward(rows, low, *tensors)
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        return low, *(x.new_empty(()).expand(*x.shape[:-1], spec.shape[0]) for spec in specs)

    @staticmethod
    def backward(ctx, _grad_low, *grads_y):
        rows, low, *tensors = ctx.saved_tensors
        layers = len(ctx.specs)
        factors_a, factors_b, frozen = tensors[:layers], tensors[layers : 2 * layers], iter(tensors[2 * layers :])
        frozen, lows = [tuple(islice(frozen, count)) for count in ctx.counts], low.chunk(layers, dim=1)
        used = [number for number in range(layers) if grads_y[number] is not None]
        grads = {number: grads_y[number].reshape(-1, grads_y[number].shape[-1]) for number in used}
        dtype, shape = grads_y[used[0]].dtype, grads_y[used[0]].shape[:-1]
        grad_low = _joined([grads[number] @ factors_b[number].to(dtype) for number in used], 1, dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            factor, first = _joined([factors_a[number] for number in used], 0, dtype).t(), used[0]
            weights = {number: ctx.merged.pop(number, (ctx.specs[number], frozen[number])) for number in used}
            spec, own = weights[first]
            if ctx.specs[first].merging:  # the update is in the weight
                grad_x = product(grads[first], spec, own, kept=ctx.kept, of_gradient=True)
            else:  # rounded with what it is added to, which under torch.compile needs one operator
                inputs = grad_low, factor, grads[first], spec, own
                grad_x = product_beside(*inputs, None, ctx.kept, again=False, of_gradient=True)
            for number in used[1:]:
                spec, own = weights[number]
                add_product(grad_x, grads[number], spec, own, kept=ctx.kept, of_gradient=True)
            grad_x = grad_x.view(*shape, grad_x.shape[-1])
        grads_a, grads_b = [None] * layers, [None] * layers
        for number, grad_a in zip(used, (grad_low.t() @ rows).chunk(len(used)), strict=True):
            grads_a[number] = grad_a.to(factors_a[number].dtype)
            grads_b[number] = (grads[number].t() @ lows[number]).to(factors_b[number].dtype)
        return grad_x, None, None, None, None, None, *grads_a, *grads_b, *(None for _ in range(sum(ctx.counts)))


def _joined(tensors: Sequence[torch.Tensor], dim: int, dtype: torch.dtype) -> torch.Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)).to(dtype)


def _dropped(x: torch.Tensor, share: float) -> torch.Tensor:
    """Zero values at random; for backward a GPU's kernel keeps a byte of each, a CPU's operators more."""
    return torch.native_dropout(x, share, True)[0] if on_gpu(x) else functional.dropout(x, share)


class _LoraProduct(torch.autograd.Function):
    """Compute ``x W^T + bias + low B^T``; save nothing and hand y's gradient on to ``_LoraGradient``."""

    @staticmethod
    def forward(ctx, gradient, low, x, lora_b, bias, spec, kept, *frozen):
        if low is None:  # the update is in the weight
            return product(x, spec, frozen, bias, kept, again=True)
        return product_beside(low, lora_b.to(x.dtype), x, spec, frozen, bias, kept, again=True)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, *(None for _ in ctx.needs_input_grad[1:])


class LoraWeights(nn.Module):
    """The factors ``lora_A`` [r E, in] and ``lora_B`` [out, r E] beside E frozen weights; E is 1 of a linear layer.

    Args:
        shape: of a frozen weight, (out, in).
        experts: E.
        device: of the factors.
        rank: r, at least 1.
        alpha: numerator of the scale.
        dropout: probability of dropping an input of the low-rank branch while training, in [0, 1).
        rslora: divide alpha by sqrt(r) instead of r.
        dtype: of the factors.
    """

    def __init__(self, shape, experts, device, rank, alpha, dropout, rslora, dtype):
        super().__init__()
        out_features, in_features = shape
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = lora_scale(alpha, rank, rslora)
        self.lora_A = nn.Parameter(torch.empty(rank * experts, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank * experts, dtype=dtype, device=device))
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

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}, rslora={self.rslora}"


class LoraExperts(LoraWeights):
    """The factors beside a projection of all experts of a block, which computes with them (``experts.packing``).

    They have peft's layout: an expert's rows of A are together, its columns of B are E apart.
    """

    def __init__(self, projection: Projection, rank, alpha, rslora, dtype):
        spec, tensors = projection.described
        super().__init__(spec.shape[1:], spec.shape[0], tensors[0].device, rank, alpha, 0.0, rslora, dtype)


class LoraLinear(LoraWeights):
    """Wrap a frozen linear layer with the factors ``lora_A`` [r, in] and ``lora_B`` [out, r].

    Args:
        base: ``QuantLinear``, ``nn.Linear`` or ``Conv1D``; its parameters are frozen here.
        rank, alpha, dropout, rslora, dtype: see ``LoraWeights``.

    ``shared`` is the set of layers that this one's input is shared with, if any; see ``SharedInput``. ``path`` is its
    name in the model. ``merging`` says into what the update is merged in the weight that the layer computes with; None
    adds it to the frozen weight's product. ``merged`` is that weight while it is kept (``inject.merged_once``), which
    ``caches_merged`` allows.
    """

    shared: "SharedInput | None" = None
    path = "a layer"
    merging: Merging | None = None
    caches_merged = False
    merged: tuple[WeightSpec, tuple[torch.Tensor, ...]] | None = None

    def __init__(self, base, rank, alpha, dropout, rslora, dtype):
        shape = frozen_weight(base)[0].shape
        super().__init__(shape, 1, base.weight.device, rank, alpha, dropout, rslora, dtype)
        self.base = base.requires_grad_(False)

    @property
    def weight(self) -> torch.Tensor:
        """There is none: the layer is no product with one tensor.

        Raises:
            ModelError: always; the architecture, Mamba for one, would compute with the weight past the factors.
        """
        raise no_weight(self.path)

    @property
    def described(self) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
        """The weight that is multiplied by, as spec and tensors."""
        spec, frozen = frozen_weight(self.base)
        if self.merging is None:
            return spec, frozen
        return spec._replace(merging=self.merging), (*frozen, self.lora_A.detach(), self.lora_B.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.base.bias
        is_trained = bias is not None and bias.requires_grad  # for which the fused path has no gradient
        if self.training and self.dropout > 0:
            y = self.by_autograd(x, _dropped(x, self.dropout), with_bias=not is_trained)
        else:
            y = self.adapted_product(x, with_bias=not is_trained)
        return y + bias if is_trained else y

    def adapted_product(self, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """Return y by the fused path; without dropout."""
        y = small_batch_product(self.base, x, with_bias) if self.merging is None else None
        if y is not None:
            return add_update(y, x, self.lora_A, self.lora_B, self.scale)
        begun, number = (begin(x, [self]), 0) if self.shared is None else self.shared.begun_for(self, x)
        return end(self, begun, number, with_bias)

    def by_autograd(self, x: torch.Tensor, branch: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """Return y by the formula, the low-rank part of an input of its own: plain autograd around the frozen product.

        Args:
            branch: the low-rank part's input.
        """
        spec, frozen = frozen_weight(self.base)
        return FrozenMatmul.apply(x, self.update(branch), self.base.bias if with_bias else None, spec, *frozen)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scale * (x A^T) B^T`` by plain autograd."""
        low = self.scale * functional.linear(x, self.lora_A.to(x.dtype))
        return functional.linear(low, self.lora_B.to(x.dtype))


class SharedInput:
    """LoRA layers of one rank, scale and type, called in order with the same input; each holds its set."""

    def __init__(self, layers: Sequence[LoraLinear]):
        self.layers = tuple(layers)
        self._begun: Begun | None = None
        for layer in self.layers:
            layer.shared = self

    def begun_for(self, layer: LoraLinear, x: torch.Tensor) -> tuple[Begun, int]:
        """Return the products that the first layer began for all, and which of them is this layer's."""
        number = self.layers.index(layer)
        if number == 0:
            self._begun = begin(x, self.layers)
        begun = self._begun
        if begun is None or begun.x is not x:
            self.fall_apart()
            return begin(x, [layer]), 0
        if number == len(self.layers) - 1:
            self._begun = None
        return begun, number

    def forget(self) -> None:
        """Drop what the first layer began."""
        self._begun = None

    def fall_apart(self) -> None:
        """Let each layer compute by itself."""
        self.forget()
        for layer in self.layers:
            layer.shared = None
