"""Compute the experts of a block whose weights are in 4 bits, a few experts at a time.

Each token of a block goes through a few of its experts. Pairs of a token and an expert are sorted by expert; then the
weights of one expert after the other, or of a few small ones, are dequantised, used for their rows, a tile at a time,
and dropped. So what lies in memory does not depend on what the router does. (transformers' grouped product wants all
experts of a block in 16 bit: 1.1 GiB of Qwen3-30B-A3B's.) The host waits for the router once a pass, and starts some
ten kernels for each expert: on a GPU, ``grouped`` can compute the same with few, and this is its oracle.

Backward keeps the block's input, the router's choice and its weights, and computes each tile's first product again. As
in ``offload.tile`` one autograd function stands for the result in the graph and one computes it, so that a checkpointed
block's recomputation can leave the value out.

LoRA weights beside a projection add ``scale * B_e A_e x`` to what expert e computes. Their gradients are sums over the
expert's rows, and zero where it has none. (peft adds B_e A_e to all experts' weights, in every pass.)

Shapes: T tokens of hidden size D, K experts a token, E experts of inner size I, n rows of a tile, rank r; the first
product of a gated expert has 2 I columns.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch.nn.functional import linear, pad

from qlora_lite.memory.marks import repeated
from qlora_lite.memory.shapes import CPU_MULTIPLE, device_type, is_planned, kernel_rows, pieces
from qlora_lite.offload.checkpoint import product_or_placeholder
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.product import WeightSpec

from . import grouped
from .grouped import Experts, LowRank, Parts, parts_of

TILE_ROWS = 1024  # bounds what is beside the weights
DEQUANTIZED_BYTES = 1 << 27  # of experts that are dequantised together, so that small ones take few calls


def routed(
    hidden_TD: torch.Tensor,
    chosen_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts: Experts,
    tensors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the sum over a token's experts of ``weight * down(activate(up(hidden)))``, [T, D].

    The weights of the experts get no gradient; hidden states, the router's weights and LoRA weights do.

    Args:
        chosen_TK: numbers of each token's experts, different ones.
        tensors: of up and down, their biases and LoRA weights; see ``Experts``.
    """
    if chosen_TK.numel() < experts.up.shape[0]:  # then not all are in use
        experts = experts._replace(grouped=False)
    gradient = _Gradient.apply(hidden_TD, weights_TK, chosen_TK, experts, *tensors)
    inputs = hidden_TD.detach(), weights_TK.detach(), chosen_TK, experts, *(tensor.detach() for tensor in tensors)
    return product_or_placeholder(lambda: _Value.apply(gradient, *inputs), gradient)


class _Projection(NamedTuple):
    """A projection of one expert: its weight [out, in], bias [out] and LoRA weights."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora: LowRank | None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [n, out] of rows x; what LoRA adds is rounded with the sum, once."""
        if self.lora is None:
            return linear(x, self.weight, self.bias)
        y = linear(self.lora.low(x), self.lora.lora_b).addmm_(x, self.weight.t())
        return y if self.bias is None else y.add_(self.bias)

    def gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x from y's."""
        if self.lora is None:
            return grad @ self.weight
        return (self.lora.low_gradient(grad) @ self.lora.lora_a).addmm_(grad, self.weight)


class _Part(NamedTuple):
    """Rows of one expert, and its projections; those beyond ``rows`` fill a kernel and mean nothing."""

    expert: int
    rows: int
    tokens: torch.Tensor  # int64 [n]
    pairs: slice  # rows of the sorted ones
    up: _Projection
    down: _Projection

    def add_rows(self, sum_TD: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows [n, D] to those of their tokens."""
        sum_TD.index_add_(0, self.tokens[: self.rows], rows[: self.rows].to(sum_TD.dtype))


class _Pairs(NamedTuple):
    """Pairs of a token and an expert, sorted by expert: P = T K of them.

    Args:
        experts: their numbers, int64 [P].
        places: of the pairs in the flattened [T, K], int64 [P].
        tokens: their numbers, int64 [P].
    """

    experts: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor


def _sorted(chosen_TK: torch.Tensor) -> _Pairs:
    experts, places = chosen_TK.flatten().sort(stable=True)
    return _Pairs(experts, places, places // chosen_TK.shape[1])


def _for_each_part(
    do: Callable[[_Part], None],
    sorted_pairs: _Pairs,
    most_rows: int,
    dtype: torch.dtype,
    experts: Experts,
    parts: Parts,
) -> None:
    """Call ``do`` with the rows of each expert that has any, in tiles; it may keep nothing of them.

    Args:
        most_rows: that one expert can have, T.
    """
    tokens, end = sorted_pairs.tokens, 0
    stored = (experts.up, parts.up), (experts.down, parts.down)
    groups = list(_groups(sorted_pairs.experts, most_rows, experts, dtype))
    numbers = torch.tensor([share.expert for group in groups for share in group.shares], device=tokens.device)
    for group, of_group in zip(groups, numbers.split([len(group.shares) for group in groups]), strict=True):
        with repeated(group.times):
            weights = [_weights(*each, group, of_group, dtype) for each in stored]
            for place, (expert, of_it, times, kinds) in enumerate(group.shares):
                start, end = end, end + of_it
                own = [
                    _Projection(each[place], None if bias is None else bias[expert], lora and lora.of(expert))
                    for each, bias, lora in zip(weights, parts.biases, parts.lora, strict=True)
                ]
                with repeated(times, kinds):
                    for tile in pieces(of_it, TILE_ROWS):
                        pairs = slice(start + tile.start, start + tile.stop)
                        here = tokens[pairs]
                        count, rows = len(here), kernel_rows(len(here), here.device)
                        filled = pad(here, (0, rows - count)) if rows > count else here
                        do(_Part(expert, count, filled, pairs, *own))
        del weights, own  # before the next are dequantised


class _Share(NamedTuple):
    """How many rows an expert has; in a plan, so many ``times`` over, in products of so many ``kinds`` of shapes."""

    expert: int
    rows: int
    times: int = 1
    kinds: int = 1


class _Group(NamedTuple):
    """Experts that are dequantised together; in a plan, so many ``times`` over."""

    shares: list[_Share]
    times: int = 1

    @property
    def neighbours(self) -> slice | None:
        """The experts' numbers where they follow one another, so that their packed weights need no copy."""
        first, last = self.shares[0].expert, self.shares[-1].expert
        return slice(first, last + 1) if last - first == len(self.shares) - 1 else None


def _groups(numbers: torch.Tensor, most_rows: int, experts: Experts, dtype: torch.dtype) -> Iterator[_Group]:
    """Yield the experts that have rows, as many at a time as ``DEQUANTIZED_BYTES`` have room for.

    ``numbers`` are the experts' of all pairs, sorted. The host waits for the device once.
    A plan knows no router: one expert has as many rows as it can have, those of all tokens, and the others share what
    is left.
    """
    count, weights = experts.up.shape[0], sum(prod(spec.shape[1:]) for spec in (experts.up, experts.down))
    at_once = max(1, DEQUANTIZED_BYTES // (weights * dtype.itemsize))
    if not is_planned():
        all_of_them = torch.arange(count + 1, dtype=numbers.dtype, device=numbers.device)
        rows = torch.searchsorted(numbers, all_of_them).diff().tolist()
        shares = [_Share(expert, of_it) for expert, of_it in enumerate(rows) if of_it]
        yield from (_Group(shares[start : start + at_once]) for start in range(0, len(shares), at_once))
        return
    pairs = numbers.numel()
    others = min(count, pairs) - 1
    share = min(pairs - most_rows, max(1, -(-(pairs - most_rows) // max(1, others))))
    # how many counts of rows there are, since the other blocks' experts have others
    kinds = -(-min(most_rows, TILE_ROWS) // CPU_MULTIPLE) if device_type(numbers.device) == "cpu" else 1
    here = min(at_once - 1, others)
    yield _Group([_Share(0, most_rows), *_alike(share, here, kinds)])
    for times, size in (((others - here) // at_once, at_once), (1, (others - here) % at_once)):
        if times and size:
            yield _Group(_alike(share, size, kinds), times)


def _alike(rows: int, count: int, kinds: int) -> list[_Share]:
    """Return the shares of so many experts in a plan: one stands for all, and the others have no rows."""
    return [_Share(0, rows, count, kinds), *[_Share(0, 0)] * (count - 1)] if count else []


def _weights(
    spec: WeightSpec, tensors: Sequence[torch.Tensor], group: _Group, numbers: torch.Tensor, dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    """Return the weights [out, in] of a group's experts: dequantised, or views of those in 16 bit.

    Args:
        numbers: of the experts, on the device.
    """
    if spec.quant_type is None:
        weight = tensors[0].transpose(1, 2) if spec.transposed else tensors[0]
        return [weight[share.expert].to(dtype) for share in group.shares]
    which = group.neighbours or numbers
    return FORMATS[spec.quant_type].dequantize_rows(tensors, spec.shape, which, dtype)


def _value(hidden_TD, weights_TK, chosen_TK, experts: Experts, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute one expert after the other."""
    sum_TD = torch.zeros(hidden_TD.shape, dtype=_exact(hidden_TD.dtype), device=hidden_TD.device)
    pairs = _sorted(chosen_TK)
    weights = weights_TK.flatten()[pairs.places]

    def add(part: _Part) -> None:
        y = part.down.product(experts.activate(part.up.product(hidden_TD[part.tokens])))[: part.rows]
        part.add_rows(sum_TD, y.mul_(weights[part.pairs, None]))

    parts = parts_of(experts, tensors, hidden_TD.dtype)
    _for_each_part(add, pairs, len(hidden_TD), hidden_TD.dtype, experts, parts)
    return sum_TD.to(hidden_TD.dtype)


def _gradients(
    grad_TD, hidden_TD, weights_TK, chosen_TK, experts: Experts, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the gradients for the hidden states, the router's weights and LoRA weights, one expert after the other.

    Those of an expert that no token chose are zero.
    """
    exact = _exact(hidden_TD.dtype)
    grad_hidden_TD = torch.zeros(hidden_TD.shape, dtype=exact, device=hidden_TD.device)
    pairs = _sorted(chosen_TK)
    weights = weights_TK.flatten()[pairs.places]
    grad_weights = torch.zeros(weights.shape, dtype=exact, device=hidden_TD.device)
    parts = parts_of(experts, tensors, hidden_TD.dtype)
    sums_up, sums_down = (lora and lora.zeros() for lora in parts.lora)

    def add(part: _Part) -> None:
        grad, own = grad_TD[part.tokens], slice(part.rows)
        first = part.up.product(hidden_TD[part.tokens]).requires_grad_()
        with torch.enable_grad():
            inner = experts.activate(first)
        grad_inner = part.down.gradient(grad)
        of_weights = (grad_inner * inner.detach()).sum(-1, dtype=exact)
        if part.down.bias is not None:
            of_weights += (grad * part.down.bias).sum(-1, dtype=exact)
        grad_weights[part.pairs] = of_weights[own]
        if part.down.lora is not None and sums_down is not None:
            weighted = grad[own] * weights[part.pairs, None]
            part.down.lora.add_gradients(sums_down.of(part.expert), inner.detach()[own], weighted.to(grad.dtype))
        grad_inner[own].mul_(weights[part.pairs, None])
        (grad_first,) = torch.autograd.grad(inner, first, grad_inner)
        if part.up.lora is not None and sums_up is not None:
            part.up.lora.add_gradients(sums_up.of(part.expert), hidden_TD[part.tokens[own]], grad_first[own])
        part.add_rows(grad_hidden_TD, part.up.gradient(grad_first))

    _for_each_part(add, pairs, len(hidden_TD), hidden_TD.dtype, experts, parts)
    grad_weights = torch.empty_like(grad_weights).index_copy_(0, pairs.places, grad_weights)
    grad_weights = grad_weights.view(weights_TK.shape).to(weights_TK.dtype)
    trained = [part for sums in (sums_up, sums_down) if sums is not None for part in sums.as_layer()]
    return grad_hidden_TD.to(hidden_TD.dtype), grad_weights, *trained


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums over experts are kept in."""
    return torch.promote_types(dtype, torch.float32)


class _Gradient(torch.autograd.Function):
    """Stand for the result in the graph, without memory or values; take its gradient."""

    @staticmethod
    def forward(ctx, hidden_TD, weights_TK, chosen_TK, experts, *tensors):
        ctx.experts = experts
        ctx.save_for_backward(hidden_TD, weights_TK, chosen_TK, *tensors)
        return hidden_TD.new_empty(()).expand(hidden_TD.shape)

    @staticmethod
    def backward(ctx, grad_TD):
        hidden_TD, weights_TK, chosen_TK, *tensors = ctx.saved_tensors
        gradients = grouped.gradients if ctx.experts.grouped else _gradients
        grad_hidden_TD, grad_weights_TK, *grad_lora = gradients(
            grad_TD, hidden_TD, weights_TK, chosen_TK, ctx.experts, tensors
        )
        frozen = len(tensors) - len(grad_lora)
        of_lora = [grad.to(tensor.dtype) for grad, tensor in zip(grad_lora, tensors[frozen:], strict=True)]
        return grad_hidden_TD, grad_weights_TK, None, None, *(None for _ in range(frozen)), *of_lora


class _Value(torch.autograd.Function):
    """Compute the result, save nothing, and hand its gradient on to ``_Gradient``."""

    @staticmethod
    def forward(ctx, gradient, hidden_TD, weights_TK, chosen_TK, experts, *tensors):
        compute = grouped.value if experts.grouped else _value
        return compute(hidden_TD, weights_TK, chosen_TK, experts, tensors)

    @staticmethod
    def backward(ctx, grad_TD):
        return grad_TD, *(None for _ in ctx.needs_input_grad[1:])
