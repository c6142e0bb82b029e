"""Gradient checkpointing: keep a block's input, and compute the rest again in backward.

One autograd function around the block's call. torch's own non-reentrant checkpoint gives the same numbers; it
catches what the block saves with saved-tensor hooks of its own, so that nobody else's hooks (the ledger's, an
offloading policy's) see the recomputed tensors. Here backward simply runs the block again with gradients on
and calls backward through it: less Python, and every tensor shows.

Two things are not recomputed. Results that a function asks to keep (``kept_result``: attention's is one
hidden-sized tensor, and the dearest of a block per byte on a CPU; ``kernels.kept_attention``, where fused kernels
compute it and the policy says so). And the value of the block's last product,
where it is only added to the residual stream: the recomputation is there for the graph and for what the block
saves, and nobody reads its output. Whether that holds shows in the graph (``recompute_for_backward``).

What is kept stays on the device, or goes to host memory with a ``HostStore``. With ``Segments`` only the first of
some blocks in a row keeps its input, and all of them are recomputed at once.

Source: training deep nets with sublinear memory cost, arXiv 1604.06174, section 4.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from qlora_lite.errors import ModelError

from . import compiled
from .offload import HostStore


class Run:
    """One run of a block's code: a first one keeps and counts, a later one replays and leaves out.

    Args:
        results: what an earlier run kept; None keeps.
        skipped: number of the product, from 1, whose value this run leaves out; 0 for none.
        attention: for each call of ``kept_attention`` what an earlier run kept beside its tensors; None for a policy
            that keeps none.
        draws: False where an earlier run of the same code has drawn no random number.
    """

    def __init__(
        self,
        results: list[torch.Tensor] | None = None,
        skipped: int = 0,
        attention: list | None = None,
        draws: bool = True,
    ):
        self.kept: list[torch.Tensor] = []
        self.draws = draws
        self.products = 0
        self.attention = attention
        self._calls = iter(attention or ())
        self._results = None if results is None else iter(results)
        self._skipped = skipped
        self._last: tuple[weakref.ref, object] | None = None  # the last product and its node in the graph

    @property
    def is_first(self) -> bool:
        """Whether this run keeps."""
        return self._results is None

    def next_result(self) -> torch.Tensor:
        """Return the next tensor that an earlier run kept."""
        return next(self._results)

    def next_attention(self):
        """Return what an earlier run kept of the next call of ``kept_attention`` beside its tensors."""
        return next(self._calls)

    def result(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a result that an earlier run kept; a first run keeps it, and one that was given none computes it."""
        if not self.is_first:
            kept = next(self._results, None)
            return compute() if kept is None else kept
        self.kept.append(compute())
        return self.kept[-1]

    def product(self, compute: Callable[[], torch.Tensor], placeholder: torch.Tensor) -> torch.Tensor:
        """Return a product, or its placeholder if it is the one to leave out."""
        self.products += 1
        y = placeholder if self.products == self._skipped else compute()
        self._last = weakref.ref(y), y.grad_fn
        return y

    def returns_last(self, output: torch.Tensor) -> bool:
        """Return whether the output is the last product as it was made."""
        return self._last is not None and output.grad_fn is self._last[1]

    def only_adds_last(self, outputs) -> bool:
        """Return whether a block's one output is a sum, in memory of its own, and the last product one of its terms."""
        node = outputs.grad_fn if isinstance(outputs, torch.Tensor) else None
        if node is None or self._last is None or node.name() != "AddBackward0":
            return False
        product, product_node = self._last
        terms = [_before_views(term) for term, _ in node.next_functions]
        return product() is not outputs and any(term is product_node for term in terms)


def _before_views(node):
    """Return the node of the tensor that another shape was given to."""
    while node is not None and node.name() in _VIEWS:
        ((node, _),) = node.next_functions
    return node


_VIEWS = "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"  # of results with their elements in order
_run: ContextVar[Run | None] = ContextVar("run", default=None)
_row: ContextVar[int] = ContextVar("row", default=0)


@contextmanager
def sequence_alone(number: int) -> Iterator[None]:
    """Run the blocks for one of several rows, counted from 0, that all go forward before the first goes backward."""
    token = _row.set(number)
    try:
        yield
    finally:
        _row.reset(token)


def kept_result(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what ``compute()`` gives, from the first run if this is the recomputation of a checkpointed block."""
    run = present_run()
    return compute() if run is None else run.result(compute)


def product_or_placeholder(compute: Callable[[], torch.Tensor], placeholder: torch.Tensor) -> torch.Tensor:
    """Return what ``compute()`` gives, or the placeholder where a block's recomputation has no use for the value.

    Args:
        placeholder: same shape, any values, and a node in the graph that takes the gradient of the product.
    """
    run = present_run()
    return compute() if run is None else run.product(compute, placeholder)


def present_run() -> Run | None:
    """Return the run that the code is in, None outside of all blocks."""
    return None if torch.compiler.is_compiling() else _run.get()  # torch.compile cannot trace a context variable


@dataclass(slots=True)
class Skipping:
    """Which product runs for the graph leave out, shared by blocks of a kind; see ``recompute_for_backward``."""

    product: int | None = None  # its number from 1, 0 for none; None before the first such run has shown it


class Segments:
    """Cut a model's checkpointed blocks into segments of which only the first block keeps its input.

    A block that is not given the very output of the one before begins a segment too: what a model does between its
    blocks is not recomputed.

    Args:
        length: blocks of a segment; the first one may have fewer.
        count: checkpointed blocks of the model.
    """

    def __init__(self, length: int = 1, count: int = 0):
        self.length, self.count = length, count
        self._calls: list = []  # of the segment that has begun
        self._output: weakref.ref | None = None

    def earlier_calls(self, number: int, tensors: Sequence[torch.Tensor]) -> list:
        """Return the contexts of the calls before this one in its segment; none where it begins one.

        Args:
            number: of the block, counted along the model.
            tensors: what it is given.
        """
        goes_on = self._output is not None and len(tensors) == 1 and self._output() is tensors[0]
        if (self.count - number) % self.length == 0 or not goes_on:
            self._calls = []
        return list(self._calls)

    def add(self, number: int, call: torch.autograd.function.FunctionCtx, outputs) -> None:
        """Have the next block continue from this call, unless the segment ends here."""
        if (self.count - number - 1) % self.length == 0 or not isinstance(outputs, torch.Tensor):
            self._calls, self._output = [], None
        else:
            self._calls.append(call)
            self._output = weakref.ref(outputs)


class Checkpoint:
    """Call a block so that only its tensor inputs are kept; one object for each block.

    ``Checkpoint()(block, *inputs)`` equals ``block(*inputs)``. Inputs are positional; the recomputation starts from the
    random state of the first, so that dropout repeats itself. Where the first run has left that state as it was, so
    will the second, and the state is not kept: on a GPU, to save and restore it takes longer than many an operation.

    Args:
        number: of the block, counted along the model.
        host: where the inputs wait for backward; None keeps them on their device.
        skipping: shared by blocks of one kind; see ``Skipping``.
        around: a context to be in during the recomputation, such as ``quant.product.keeping_weights``.
        keeps_attention: keep the results of attention's fused kernels too; see ``kernels.kept_attention``.
        compiling: run the block compiled (``offload.compiled``), its recomputation and its gradients as one graph.
        segments: shared by the blocks of a model; without, each block keeps its input.
        trains: whether anything in the block is trained; where not, and no input needs a gradient, nothing is kept.
    """

    def __init__(
        self,
        number: int = 0,
        host: HostStore | None = None,
        skipping: "Skipping | None" = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
        keeps_attention: bool = False,
        compiling: bool = False,
        segments: Segments | None = None,
        trains: Callable[[], bool] = lambda: True,
    ):
        self.number, self.host, self.skipping, self.around = number, host, skipping or Skipping(), around
        self.keeps_attention, self.compiling, self.segments = keeps_attention, compiling, segments or Segments()
        self.trains = trains

    def __call__(self, block: Callable, *inputs):
        # such as DeBERTa's relative positions, which all blocks share; a compiler is given the block as it is
        named = {} if self.compiling else _trained_keywords(block)
        if named:
            block, inputs = _by_position(block, [*named], len(inputs)), (*inputs, *named.values())
        if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs) and not self.trains():
            return compiled.value(block, *inputs) if self.compiling else block(*inputs)
        # The anchor makes autograd visit a block whose input needs no gradient (the first of a frozen model).
        anchor = torch.empty(0, requires_grad=True)
        return _Checkpoint.apply(self, block, anchor, *inputs)


def _trained_keywords(block: Callable) -> dict[str, torch.Tensor]:
    """Return the tensors with a gradient among the keywords that a block is already given."""
    keywords = block.keywords if isinstance(block, partial) else {}
    return {k: value for k, value in keywords.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def _by_position(block: Callable, names: Sequence[str], count: int) -> Callable:
    """Return a block that takes some of its keywords behind so many inputs."""

    def call(*inputs):
        return block(*inputs[:count], **dict(zip(names, inputs[count:], strict=True)))

    return call


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, checkpoint, block, _anchor, *inputs):
        ctx.checkpoint, ctx.block = checkpoint, block
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.others = [None if place in ctx.places else value for place, value in enumerate(inputs)]
        tensors = [inputs[place] for place in ctx.places]
        ctx.earlier = checkpoint.segments.earlier_calls(checkpoint.number, tensors)
        ctx.random_state = random_state(*tensors)
        with running(Run(attention=[] if checkpoint.keeps_attention else None)) as run:
            # autograd functions run forward without recording; a compiler would still tell inputs by their gradients
            outputs = compiled.value(block, *map(_detached, inputs)) if checkpoint.compiling else block(*inputs)
        if is_present(ctx.random_state):
            ctx.random_state = None
        ctx.own_inputs, ctx.attention, ctx.passed_on = 0 if ctx.earlier else len(tensors), run.attention, None
        tensors = tensors[: ctx.own_inputs] + run.kept
        ctx.number = checkpoint.number + _row.get() * checkpoint.segments.count
        if checkpoint.host is None:
            ctx.save_for_backward(*tensors)
        else:
            checkpoint.host.put(ctx.number, tensors)
        ctx.set_materialize_grads(False)
        checkpoint.segments.add(checkpoint.number, ctx, outputs)
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        if ctx.passed_on is not None:
            return _hand_on(ctx, *grad_outputs)
        calls = [*ctx.earlier, ctx]
        stored = [_stored(call) for call in reversed(calls)]  # a HostStore gives them in falling order
        entered = list(calls[0].others)
        for place, tensor in zip(calls[0].places, stored[-1], strict=False):
            entered[place] = tensor.detach().requires_grad_(calls[0].needs_input_grad[3 + place])
        outputs, inputs = None, entered
        for call in calls:
            if call is not calls[0]:
                inputs = [outputs if place in call.places else value for place, value in enumerate(call.others)]
            outputs = _again(call, inputs, list(stored.pop()[call.own_inputs :]), grad_outputs, call is ctx)
        del inputs
        if ctx.checkpoint.compiling:
            grad_outputs = [outputs.detach()]
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        reached = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        if reached:  # nothing, for a block that has no factors and comes before the first that has
            torch.autograd.backward(*zip(*reached, strict=True))
        gradients = [getattr(value, "grad", None) for value in entered]
        for call in ctx.earlier:
            call.passed_on = (gradients[calls[0].places[0]],)
        return None, None, None, *gradients


def _stored(call) -> Sequence[torch.Tensor]:
    """Return what a call of a block kept: its own inputs, if any, and results."""
    host = call.checkpoint.host
    return call.saved_tensors if host is None else host.take(call.number)


def _again(call, inputs: Sequence, kept: list[torch.Tensor], grad_outputs: Sequence, is_last: bool):
    """Run a block once more for its graph: the last one of a segment without what nobody reads of it."""
    checkpoint, draws = call.checkpoint, call.random_state is not None
    with torch.enable_grad(), with_random_state(call.random_state), checkpoint.around():
        if checkpoint.compiling:
            with running(Run(kept, draws=draws)):
                return compiled.gradient_root(call.block, grad_outputs, *inputs)
        if is_last:
            return recompute_for_backward(
                call.block, inputs, kept, checkpoint.skipping, Run.only_adds_last, call.attention, draws
            )
        with running(Run(kept, attention=call.attention, draws=draws)):
            return call.block(*inputs)


def _hand_on(call, gradient: torch.Tensor | None) -> tuple:
    """Return the gradient of a segment's input as that of a block inside it, whose own part the end has computed."""
    (expected,) = call.passed_on
    if gradient is not expected:
        raise ModelError(
            "a block's output is read by more than the block after it: set memory.layers_per_checkpoint to 1"
        )
    return None, None, None, *(gradient if place in call.places else None for place in range(len(call.others)))


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, torch.Tensor) else value


def recompute_for_backward(
    function: Callable,
    inputs: Sequence,
    results: list[torch.Tensor],
    skipping: Skipping,
    unread: Callable[[Run, object], bool],
    attention: list | None = None,
    draws: bool = True,
):
    """Call a function again whose value is known already or not wanted, for its graph and for what it saves.

    The last product is left out once a run has shown that nobody reads its value. Every later run is checked too:
    where the product left out was not the last, or is read after all, the run is done again with its value.

    Args:
        results, attention, draws: what the first run kept, and whether it drew; see ``Run``.
        unread: says of a run and its output whether nobody reads the value of the last product.
    """
    state = random_state(*(value for value in inputs if isinstance(value, torch.Tensor))) if draws else None
    while True:
        left_out = skipping.product or 0
        with running(Run(results, left_out, attention, draws)) as run:
            outputs = function(*inputs)
        spared = unread(run, outputs) and left_out in (0, run.products)
        if skipping.product is None or not spared:
            skipping.product = run.products if spared else 0
        if spared or not left_out:
            return outputs
        outputs = None  # and all that its graph saved
        if state is not None:
            set_random_state(state)


@contextmanager
def running(run: Run | None) -> Iterator[Run | None]:
    """Let the code inside keep and leave out as a run says; None is outside of all blocks."""
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


class RandomState(NamedTuple):
    """The state of the random generators that a block's tensors are computed with."""

    cpu: torch.Tensor
    device: int | None  # the CUDA device, if any tensor lies there
    cuda: torch.Tensor | None


def random_state(*tensors: torch.Tensor) -> RandomState:
    """Return the random state that computing on these tensors would use."""
    device = next((tensor.get_device() for tensor in tensors if tensor.is_cuda), None)
    return RandomState(torch.get_rng_state(), device, None if device is None else torch.cuda.get_rng_state(device))


def is_present(state: RandomState) -> bool:
    """Return whether a random state is the present one: nothing was drawn since."""
    if not torch.equal(state.cpu, torch.get_rng_state()):
        return False
    return state.device is None or torch.equal(state.cuda, torch.cuda.get_rng_state(state.device))


@contextmanager
def with_random_state(state: RandomState | None) -> Iterator[None]:
    """Go back to a random state, and return to the present one at the end; None is for what draws nothing."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([] if state.device is None else [state.device]):
        set_random_state(state)
        yield


def set_random_state(state: RandomState) -> None:
    """Go back to a random state."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.cuda.set_rng_state(state.cuda, state.device)
