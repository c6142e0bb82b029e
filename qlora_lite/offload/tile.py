"""Run a part of a block that works token by token on a tile of tokens at a time.

What an MLP or a norm computes on the way is several times its input (8B: 28 KiB a token for each of four
[T, 14336] tensors, 16 KiB for a norm in float32, against 8 KiB of hidden state). Here only the input is kept, and
backward computes one tile after the other again: the largest intermediate is a tile's. In a checkpointed block,
whose recomputation would compute everything again anyway, an MLP that is only added to the residual stream costs no
product more than before: the recomputation leaves it out (see ``offload.checkpoint``).

Two autograd functions, as in ``adapters.lora.layer``: one stands for the result in the graph and takes the gradients,
one computes the value. Gradients of weights are summed over the tiles in float32 and rounded once.

Shapes: x and the result [B, T, D]; tiles cut T. Source: ALST, arXiv 2506.13996, section 3.1 (TiledMLP).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from qlora_lite.memory.shapes import pieces

from .around import Around
from .checkpoint import (
    Run,
    Skipping,
    present_run,
    product_or_placeholder,
    random_state,
    recompute_for_backward,
    running,
    with_random_state,
)


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    tile_tokens: int,
    skipping: Skipping | None = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Compute ``function(x)`` tile by tile, with gradients for x and the weights.

    Args:
        function: maps [B, t, D] to [B, t, D], each token by itself.
        weights: the trainable tensors that it uses.
        tile_tokens: most tokens of a tile.
        skipping: shared by functions of one kind; see ``offload.checkpoint``.
        around: a context to be in during all tiles, once forward and once backward.
    """
    run = present_run()
    draws = torch.is_grad_enabled() and (run is None or run.draws)  # without a graph nothing is recomputed
    state = random_state(x) if draws else None
    gradient = _Gradient.apply(function, tile_tokens, skipping or Skipping(), around, state, x, *weights)
    return product_or_placeholder(lambda: _Value.apply(gradient, function, tile_tokens, around, x.detach()), gradient)


class _Gradient(torch.autograd.Function):
    """Stand for the result in the graph, without memory or values; take its gradient and compute tile by tile."""

    @staticmethod
    def forward(ctx, function, tile_tokens, skipping, around, state, x, *weights):
        ctx.function, ctx.tile_tokens, ctx.skipping = function, tile_tokens, skipping
        ctx.around, ctx.state = around, state
        ctx.save_for_backward(x, *weights)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx, grad_y):
        x, *weights = ctx.saved_tensors
        sums = [torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) for weight in weights]
        grad_x = torch.empty_like(x)
        with torch.enable_grad(), with_random_state(ctx.state), ctx.around():
            for tile in pieces(x.shape[-2], ctx.tile_tokens):
                x_tile = x[..., tile, :].detach().requires_grad_()
                y = recompute_for_backward(
                    ctx.function, [x_tile], [], ctx.skipping, Run.returns_last, draws=ctx.state is not None
                )
                grad, *grads = torch.autograd.grad(y, [x_tile, *weights], grad_y[..., tile, :])
                grad_x[..., tile, :].copy_(grad)
                for total, part in zip(sums, grads, strict=True):
                    total.add_(part)
                del y, grad, grads
        grads = [total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)]
        return None, None, None, None, None, grad_x, *grads


class _Value(torch.autograd.Function):
    """Compute the value, save nothing, and hand the result's gradient on to ``_Gradient``."""

    @staticmethod
    def forward(ctx, gradient, function, tile_tokens, around, x):
        y = torch.empty_like(x)
        with running(None), around():
            for tile in pieces(x.shape[-2], tile_tokens):
                y[..., tile, :].copy_(function(x[..., tile, :]))
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, None, None, None, None


class Tiled(Around):
    """A module that works token by token, run on at most ``tile_tokens`` tokens at a time; see ``tiled``."""

    def __init__(
        self,
        inner: nn.Module,
        tile_tokens: int,
        skipping: Skipping | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        super().__init__(inner)
        self.tile_tokens, self.skipping, self.around = tile_tokens, skipping, around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and x.shape[-2] <= self.tile_tokens:  # a token that is answered, say
            return self.inner(x)
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        return tiled(self.inner, x, weights, self.tile_tokens, self.skipping, self.around)
