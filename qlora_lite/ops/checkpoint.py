"""Gradient checkpointing: keep a block's input, and compute the rest again in backward.

One autograd function around the block's call. torch's own non-reentrant checkpoint gives the same numbers;
it catches what the block saves with saved-tensor hooks of its own, so that nobody else's hooks (the ledger's,
an offloading policy's) see the recomputed tensors, and it replays into the old graph one node at a time. Here
backward simply runs the block again with gradients on and calls backward through it, which costs less
Python and shows every tensor to whoever watches.

``anchor`` makes autograd visit a block whose input needs no gradient (the first block of a frozen model); the
gradient of such an input is not computed.

Source: training deep nets with sublinear memory cost, arXiv 1604.06174, section 4.
"""

from collections.abc import Callable

import torch


def checkpoint(block: Callable, *inputs):
    """Return ``block(*inputs)``, keeping only the tensors among the inputs for backward.

    Args:
        block: takes the inputs, returns a tensor or a tuple of tensors; called again in backward with the
            random state of the first call, so that dropout repeats itself.
        inputs: positional; gradients flow to the tensors that need them.
    """
    anchor = torch.empty(0, requires_grad=True)
    return _Checkpoint.apply(block, anchor, *inputs)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, _anchor, *inputs):
        ctx.block = block
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.others = [None if place in ctx.places else value for place, value in enumerate(inputs)]
        tensors = [inputs[place] for place in ctx.places]
        ctx.devices = [torch.cuda.current_device()] if any(tensor.is_cuda for tensor in tensors) else []
        ctx.random_states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in ctx.devices]
        ctx.save_for_backward(*tensors)
        return block(*inputs)  # autograd functions run forward without recording

    @staticmethod
    def backward(ctx, *grad_outputs):
        inputs = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor.detach().requires_grad_(ctx.needs_input_grad[2 + place])
        with torch.enable_grad(), torch.random.fork_rng(ctx.devices):
            torch.set_rng_state(ctx.random_states[0])
            for device, state in zip(ctx.devices, ctx.random_states[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            outputs = ctx.block(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        reached = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        if reached:  # nothing, for a block that has no factors and comes before the first that has
            torch.autograd.backward(*zip(*reached, strict=True))
        return None, None, *(getattr(value, "grad", None) for value in inputs)
