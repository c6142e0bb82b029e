"""LoRA layers that get the same input, computed together: q, k and v; gate and up.

One product with all A factors (x is read once, and 3 r columns suit a kernel better than r), and in backward one
gradient of x, to which the layers add in place, in place of one tensor for each that autograd adds up. Each layer's own
product stays where it was, so that checkpointing sees the same products in the same order.

A measurement's other side (tools/bench_projections): a block's modules call their projections one by one, so the first
call of a set computes for all of them, and the others take what it left.

Shapes: x [..., in]; A of all layers [n r, in], low [T, n r].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.lora.layer import LoraLinear, _LoraProduct
from qlora_lite.ops.around import Around
from qlora_lite.ops.checkpoint import product_or_stand_in
from qlora_lite.quant.linear import frozen_weight, materialize

SETS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


class SharedInput:
    """A set of LoRA layers of one rank, scale and input, that are always called in order."""

    def __init__(self, layers: Sequence[LoraLinear]):
        assert len({(layer.rank, layer.scale, layer.dropout) for layer in layers}) == 1 and not layers[0].dropout
        self.layers = layers
        self._waiting: tuple | None = None  # what the first call left: x, low, a stand-in for each result

    def call(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return what layer ``number`` makes of x."""
        layer, (spec, frozen) = self.layers[number], frozen_weight(self.layers[number].base)
        if number == 0:
            self._waiting = x, *self._start(x)
        same_x, low, *stand_ins = self._waiting
        assert same_x is x
        if number == len(self.layers) - 1:
            self._waiting = None
        part = low[:, number * layer.rank : (number + 1) * layer.rank]
        return product_or_stand_in(
            lambda: _LoraProduct.apply(
                stand_ins[number], part, x.detach(), layer.lora_B.detach(), layer.base.bias, spec, None, *frozen
            ),
            stand_ins[number],
        )

    def _start(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = [frozen_weight(layer.base) for layer in self.layers]
        specs, counts = [spec for spec, _ in weights], [len(frozen) for _, frozen in weights]
        tensors = [*(layer.lora_A for layer in self.layers), *(layer.lora_B for layer in self.layers),
                   *(tensor for _, frozen in weights for tensor in frozen)]  # fmt: skip
        return _SharedGradient.apply(x, self.layers[0].scale, specs, counts, *tensors)


class _SharedGradient(torch.autograd.Function):
    """Compute ``low = scale * x A^T`` of all layers, and take the gradients of all of them; see ``_LoraGradient``."""

    @staticmethod
    def forward(ctx, x, scale, specs, counts, *tensors):
        layers, rows = len(specs), x.reshape(-1, x.shape[-1])
        all_a = torch.cat(tensors[:layers])
        low = functional.linear(rows, all_a.to(x.dtype)).mul_(scale)
        ctx.scale, ctx.specs, ctx.counts = scale, specs, counts
        ctx.save_for_backward(rows, low, all_a, *tensors[layers:])
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        return low, *(x.new_empty(()).expand(*x.shape[:-1], spec.shape[0]) for spec in specs)

    @staticmethod
    def backward(ctx, _grad_low, *grads):
        rows, low, all_a, *tensors = ctx.saved_tensors
        layers, dtype, shape = len(ctx.specs), grads[0].dtype, grads[0].shape[:-1]
        factors_b, frozen = tensors[:layers], iter(tensors[layers:])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        parts = [grad @ b.to(dtype) for grad, b in zip(grads, factors_b, strict=True)]
        grad_low, lows = torch.cat(parts, dim=1).mul_(ctx.scale), low.chunk(layers, dim=1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ all_a.to(dtype)
            for grad, spec, count in zip(grads, ctx.specs, ctx.counts, strict=True):
                grad_x.addmm_(grad, materialize(spec, tuple(next(frozen) for _ in range(count)), dtype))
            grad_x = grad_x.view(*shape, -1)
        grads_a = (grad_low.t() @ rows).to(all_a.dtype).chunk(layers)
        grads_b = [(grad.t() @ part).to(b.dtype) for grad, part, b in zip(grads, lows, factors_b, strict=True)]
        return grad_x, None, None, None, *grads_a, *grads_b, *(None for _ in range(sum(ctx.counts)))


class _Member(Around):
    """A layer of a set, in its place in the block."""

    def __init__(self, layer: LoraLinear, shared: SharedInput, number: int):
        super().__init__(layer)
        self.shared, self.number = shared, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.call(self.number, x)


def share_inputs(block: nn.Module, sharing: bool) -> None:
    """Compute a block's sets of projections together, or each layer by itself again."""
    for parent, names in SETS.items():
        module = block.get_submodule(parent)
        layers = [getattr(module, name) for name in names]
        layers = [layer.inner if isinstance(layer, _Member) else layer for layer in layers]
        shared = SharedInput(layers)
        for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
            setattr(module, name, _Member(layer, shared, number) if sharing else layer)
