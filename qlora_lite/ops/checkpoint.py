"""Gradient checkpointing: keep a block's input, and compute the rest again in backward.

One autograd function around the block's call. torch's own non-reentrant checkpoint gives the same numbers; it
catches what the block saves with saved-tensor hooks of its own, so that nobody else's hooks (the ledger's, an
offloading policy's) see the recomputed tensors. Here backward simply runs the block again with gradients on
and calls backward through it: less Python, and every tensor shows.

Two things are not computed again. Results that a function asks to keep (``kept_result``: attention's is one
hidden-sized tensor, and the dearest of a block per byte on a CPU). And the value of the block's last product,
where it is only added to the residual stream: the second run is there for the graph and for what the block
saves, and nobody reads its output. Whether the last product is of this kind shows in the graph of a block's
first second run.

Source: training deep nets with sublinear memory cost, arXiv 1604.06174, section 4.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class _Run:
    """One run of a block's code: the first one records, the second one replays."""

    def __init__(self, replayed: "_Run | None" = None, skip_last: bool = False):
        self.kept: list[torch.Tensor] = []
        self.products = 0
        self.last_product = None  # its node in the graph
        self._results = iter(replayed.kept) if replayed else None
        self._skipped = replayed.products if replayed and skip_last else 0

    def result(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._results is not None:
            return next(self._results)
        self.kept.append(compute())
        return self.kept[-1]

    def product(self, compute: Callable[[], torch.Tensor], stand_in: torch.Tensor) -> torch.Tensor:
        self.products += 1
        if self.products == self._skipped:
            return stand_in
        y = compute()
        self.last_product = y.grad_fn
        return y


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


def kept_result(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what ``compute()`` gives, from the first run if this is the second run of a checkpointed block."""
    run = _run.get()
    return compute() if run is None else run.result(compute)


def product_or_stand_in(compute: Callable[[], torch.Tensor], stand_in: torch.Tensor) -> torch.Tensor:
    """Return what ``compute()`` gives, or the stand-in where a block's second run has no use for the value.

    Args:
        stand_in: same shape, any values, and a node in the graph that takes the gradient of the product.
    """
    run = _run.get()
    return compute() if run is None else run.product(compute, stand_in)


class Checkpoint:
    """Call a block so that only its tensor inputs are kept; one object for each block.

    ``Checkpoint()(block, *inputs)`` equals ``block(*inputs)``. Inputs are positional; the second run starts from the
    random state of the first, so that dropout repeats itself.
    """

    def __init__(self):
        self.skip_last: bool | None = None  # not known before the first second run

    def __call__(self, block: Callable, *inputs):
        # The anchor makes autograd visit a block whose input needs no gradient (the first of a frozen model).
        anchor = torch.empty(0, requires_grad=True)
        return _Checkpoint.apply(self, block, anchor, *inputs)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, checkpoint, block, _anchor, *inputs):
        ctx.checkpoint, ctx.block = checkpoint, block
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.others = [None if place in ctx.places else value for place, value in enumerate(inputs)]
        tensors = [inputs[place] for place in ctx.places]
        ctx.devices = [torch.cuda.current_device()] if any(tensor.is_cuda for tensor in tensors) else []
        ctx.random_states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in ctx.devices]
        with _as_current(_Run()) as ctx.run:
            outputs = block(*inputs)  # autograd functions run forward without recording
        ctx.save_for_backward(*tensors, *ctx.run.kept)
        ctx.run.kept = []
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        tensors, inputs = ctx.saved_tensors, list(ctx.others)
        for place, tensor in zip(ctx.places, tensors, strict=False):
            inputs[place] = tensor.detach().requires_grad_(ctx.needs_input_grad[3 + place])
        ctx.run.kept = list(tensors[len(ctx.places) :])
        del tensors
        checkpoint, replay = ctx.checkpoint, _Run(ctx.run, bool(ctx.checkpoint.skip_last))
        ctx.run.kept = []
        with torch.enable_grad(), torch.random.fork_rng(ctx.devices), _as_current(replay):
            torch.set_rng_state(ctx.random_states[0])
            for device, state in zip(ctx.devices, ctx.random_states[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            outputs = ctx.block(*inputs)
        if checkpoint.skip_last is None:
            checkpoint.skip_last = _only_adds(outputs, replay.last_product)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        reached = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        if reached:  # nothing, for a block that has no factors and comes before the first that has
            torch.autograd.backward(*zip(*reached, strict=True))
        return None, None, None, *(getattr(value, "grad", None) for value in inputs)


def _only_adds(outputs, last_product) -> bool:
    """Tell whether a block's one output is a sum, and the last product one of its terms."""
    node = outputs.grad_fn if isinstance(outputs, torch.Tensor) else None
    if node is None or last_product is None or node.name() != "AddBackward0":
        return False
    return any(term is last_product for term, _ in node.next_functions)


@contextmanager
def _as_current(run: _Run) -> Iterator[_Run]:
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)
