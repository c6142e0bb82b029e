"""Compute the experts of a block, a group of experts at a time, without a wait.

All experts' weights are dequantised in groups of ``GROUP_BYTES``, whatever the router chose, and a group's rows are
multiplied in one launch (``kernels.grouped_product``): 73 launches a block of Qwen3-30B-A3B where one expert after the
other (``routed``) takes some thousands. So this is for batches that use most experts, on a GPU.

What all pairs of a token and an expert need is bounded by cutting the tokens into chunks of ``PAIRS_BYTES``, and what
the activation needs on the way by tiles of ``TILE_BYTES``. Both follow from shapes: what lies in memory does not depend
on the router. Each token's K results are summed by place, so that the sum is the same each time.

Shapes: T tokens of hidden size D, K experts a token, P = T K pairs, E experts of inner size I; the first product of a
gated expert has 2 I columns.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from qlora_lite.kernels.grouped_product import Pairs, add_grouped_sums, grouped_product, pairs_by_expert
from qlora_lite.memory.shapes import pieces
from qlora_lite.quant.formats import FORMATS, FOUR_BIT
from qlora_lite.quant.nf4 import Packed, absmax_of, dequantize
from qlora_lite.quant.product import WeightSpec

GROUP_BYTES = 1 << 28  # of dequantised weights
PAIRS_BYTES = 3 << 27  # of the pairs' tensors that are there together
TILE_BYTES = 1 << 26  # of the first product; the activation and its gradient take some times that


class Experts(NamedTuple):
    """What the experts of a block compute beside their weights.

    Args:
        activate: from the first product [n, I or 2 I] to the second's input [n, I].
        up, down: the weights [E, I or 2 I, D] and [E, D, I].
        tensors_of_up: how many of a flat tuple of tensors are the first's; the second's follow.
        has_bias: then come their biases, [E, I or 2 I] and [E, D].
        grouped: whether they are computed in groups where most of them have rows.
        scales: of the LoRA weights beside up and down, None where there are none. Those weights end the tuple, as
            ``LowRank.stacked`` takes them.
    """

    activate: Callable[[torch.Tensor], torch.Tensor]
    up: WeightSpec
    down: WeightSpec
    tensors_of_up: int
    has_bias: bool
    grouped: bool = False
    scales: tuple[float | None, float | None] = (None, None)

    @property
    def lora_tensors(self) -> int:
        """How many tensors at the end of the tuple are LoRA weights."""
        return 2 * sum(scale is not None for scale in self.scales)


class LowRank(NamedTuple):
    """LoRA weights beside a projection, whose weights they make ``weight + scale * lora_b @ lora_a``.

    Args:
        lora_a: [E, r, in], or [r, in] of one expert.
        lora_b: [E, out, r], or [out, r].
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float

    @classmethod
    def stacked(cls, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float, count: int, dtype: torch.dtype):
        """Return the weights of all experts by expert, from those of a layer as adapter files have them.

        Args:
            lora_a: [E r, in], the rows of an expert together.
            lora_b: [out, r E], the columns of an expert E apart.
            count: E.
        """
        by_expert = lora_b.view(len(lora_b), -1, count).permute(2, 0, 1)
        return cls(lora_a.view(count, -1, lora_a.shape[1]).to(dtype), by_expert.contiguous().to(dtype), scale)

    def of(self, expert: int) -> "LowRank":
        """Return those of one expert."""
        return LowRank(self.lora_a[expert], self.lora_b[expert], self.scale)

    def low(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scale * A x`` of rows of one expert, [n, r]."""
        return linear(x, self.lora_a).mul_(self.scale)

    def low_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ``A x`` from y's, [n, r]."""
        return (grad @ self.lora_b).mul_(self.scale)

    def add_gradients(self, sums: "LowRank", x: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the gradients of A and B from y's to the expert's."""
        sums.lora_a.addmm_(self.low_gradient(grad).t(), x)
        sums.lora_b.addmm_(grad.t(), self.low(x))

    def low_of_pairs(self, x: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return ``scale * A x`` for each pair, by place, [P, r], of all experts.

        Args:
            x: [T, in] of the tokens, or [P, in] of the pairs.
        """
        return _of_pairs(x, pairs, self.lora_a).mul_(self.scale)

    def low_gradient_of_pairs(self, grad: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return the gradient of ``A x`` for each pair from y's, [P, r]."""
        return _of_pairs(grad, pairs, self.lora_b.transpose(1, 2)).mul_(self.scale)

    def add_gradients_of_pairs(
        self, sums: "LowRank", x: torch.Tensor, grad: torch.Tensor, pairs: Pairs, scale: torch.Tensor
    ) -> None:
        """Add the gradients of A and B from ``scale`` [P] times y's to those of all experts."""
        x, grad, scale = x.contiguous(), grad.contiguous(), scale[:, None]
        add_grouped_sums(sums.lora_a, self.low_gradient_of_pairs(grad, pairs).mul_(scale), x, *pairs)
        add_grouped_sums(sums.lora_b, grad, self.low_of_pairs(x, pairs).mul_(scale), *pairs)

    def zeros(self) -> "LowRank":
        """Return zeros of the same shapes."""
        return LowRank(torch.zeros_like(self.lora_a), torch.zeros_like(self.lora_b), self.scale)

    def as_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B, or their gradients, as ``stacked`` was given them."""
        return self.lora_a.flatten(0, 1), self.lora_b.permute(1, 2, 0).flatten(1)


def _of_pairs(rows: torch.Tensor, pairs: Pairs, weights: torch.Tensor) -> torch.Tensor:
    """Return each pair's row times its expert's weight of [E, out, in], by place."""
    out = rows.new_empty(len(pairs.places), weights.shape[1])
    grouped_product(out, rows.contiguous(), weights, *pairs, 0)
    return out


class Parts(NamedTuple):
    """What the tensors of ``Experts`` are: the stored ones of up and down, and both's biases and LoRA weights."""

    up: Sequence[torch.Tensor]
    down: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    lora: Sequence[LowRank | None]


def parts_of(experts: Experts, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Parts:
    """Take the tensors apart, LoRA weights in a type."""
    end = len(tensors) - experts.lora_tensors
    added, frozen = iter(tensors[end:]), tensors[:end]
    biases: Sequence[torch.Tensor | None] = (None, None)
    if experts.has_bias:
        frozen, biases = frozen[:-2], frozen[-2:]
    lora = [
        None if scale is None else LowRank.stacked(next(added), next(added), scale, experts.up.shape[0], dtype)
        for scale in experts.scales
    ]
    return Parts(frozen[: experts.tensors_of_up], frozen[experts.tensors_of_up :], biases, lora)


class _Weights(NamedTuple):
    """One projection of all experts.

    Args:
        stored: the weight in 16 bit; or codes, and absmax in float32; or the parts of another format.
        bias: [E, out], where it has one.
        lora: LoRA weights, where it has some.
    """

    spec: WeightSpec
    stored: Sequence[torch.Tensor]
    bias: torch.Tensor | None
    lora: LowRank | None

    def product(self, rows: torch.Tensor, pairs: Pairs, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``scale * (weight @ row + bias)`` for each pair, by place, [P, out].

        Args:
            rows: [T, in] of the tokens, or [P, in] of the pairs.
            scale: [P].
        """
        return self._grouped(rows, pairs, self.bias, scale, of_gradient=False)

    def gradient(self, grad: torch.Tensor, pairs: Pairs, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``scale * (grad @ weight)`` for each pair, by place, [P, in]; arguments as for ``product``."""
        return self._grouped(grad, pairs, None, scale, of_gradient=True)

    def _grouped(self, rows, pairs, bias, scale, of_gradient):
        (count, *shape), lora = self.spec.shape, self.lora
        rows = rows.contiguous()
        if lora is None:
            out = rows.new_empty(len(pairs.places), shape[of_gradient])
        elif of_gradient:
            out = _of_pairs(lora.low_gradient_of_pairs(rows, pairs), pairs, lora.lora_a.transpose(1, 2))
        else:
            out = _of_pairs(lora.low_of_pairs(rows, pairs), pairs, lora.lora_b)
        for group in pieces(count, even_size(count, GROUP_BYTES, prod(shape) * rows.itemsize)):
            weights = self._group(group, rows.dtype)
            weights = weights.transpose(1, 2) if of_gradient else weights
            grouped_product(out, rows, weights, *pairs, group.start, bias, scale, lora is not None)
            del weights  # before the next are dequantised
        return out

    def _group(self, group: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [n, out, in] of some experts."""
        if self.spec.quant_type is None:
            weight = self.stored[0][group].to(dtype)
            return weight.transpose(1, 2) if self.spec.transposed else weight
        count, *shape = self.spec.shape
        if self.spec.quant_type not in FOUR_BIT:
            return FORMATS[self.spec.quant_type].dequantize_rows(self.stored, self.spec.shape, group, dtype)
        codes, absmax = (tensor.view(count, -1)[group] for tensor in self.stored)
        some = Packed(codes.reshape(-1, 1), absmax.reshape(-1))
        return dequantize(some, (len(codes), *shape), dtype, self.spec.quant_type)


def even_size(count: int, most_bytes: int, bytes_of_one: int) -> int:
    """Return the size of equal parts (the last may be smaller) that ``most_bytes`` have room for; at least 1."""
    parts = -(-count // max(1, most_bytes // bytes_of_one))
    return -(-count // parts)


def _both(experts: Experts, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[_Weights, _Weights]:
    parts = parts_of(experts, tensors, dtype)

    def weights(spec: WeightSpec, stored: Sequence[torch.Tensor], number: int) -> _Weights:
        if spec.quant_type in FOUR_BIT:
            stored = Packed(*stored).codes, absmax_of(Packed(*stored))
        return _Weights(spec, stored, parts.biases[number], parts.lora[number])

    return weights(experts.up, parts.up, 0), weights(experts.down, parts.down, 1)


def _chunks(hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, experts: Experts) -> Iterator[tuple[slice, Pairs]]:
    """Yield tokens whose pairs ``PAIRS_BYTES`` have room for, and their pairs."""
    (count, first, size), inner = experts.up.shape, experts.down.shape[2]
    bytes_of_token = chosen_TK.shape[1] * (first + max(inner, size)) * hidden_TD.itemsize
    for tokens in pieces(len(hidden_TD), even_size(len(hidden_TD), PAIRS_BYTES, bytes_of_token)):
        yield tokens, pairs_by_expert(chosen_TK[tokens], count)


def _tiles(first: torch.Tensor) -> Iterator[slice]:
    return pieces(len(first), max(1, TILE_BYTES // (first.shape[1] * first.itemsize)))


def value(hidden_TD, weights_TK, chosen_TK, experts: Experts, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the result of ``routed``."""
    out_TD, (up, down) = torch.empty_like(hidden_TD), _both(experts, tensors, hidden_TD.dtype)
    for tokens, pairs in _chunks(hidden_TD, chosen_TK, experts):
        first = up.product(hidden_TD[tokens], pairs)
        inner = first.new_empty(len(first), experts.down.shape[2])
        for tile in _tiles(first):
            inner[tile] = experts.activate(first[tile])
        del first
        y = down.product(inner, pairs, weights_TK[tokens].flatten())
        del inner
        torch.sum(y.view(-1, chosen_TK.shape[1], y.shape[1]), 1, out=out_TD[tokens])
        del y
    return out_TD


def gradients(
    grad_TD, hidden_TD, weights_TK, chosen_TK, experts: Experts, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of ``routed`` for the hidden states, the router's weights and the LoRA weights."""
    grad_hidden_TD, (up, down) = torch.empty_like(hidden_TD), _both(experts, tensors, hidden_TD.dtype)
    sums_up, sums_down = (weights.lora and weights.lora.zeros() for weights in (up, down))
    grad_weights_TK = torch.empty(weights_TK.shape, dtype=torch.float32, device=weights_TK.device)
    for tokens, pairs in _chunks(hidden_TD, chosen_TK, experts):
        grad, of_weights = grad_TD[tokens], grad_weights_TK[tokens].flatten()
        first = up.product(hidden_TD[tokens], pairs)
        grad_inner = down.gradient(grad, pairs)
        for tile in _tiles(first):
            inner_too = sums_down is not None
            _through_activation(experts.activate, first[tile], grad_inner[tile], of_weights[tile], inner_too)
        weights = weights_TK[tokens].flatten()
        if down.lora is not None and sums_down is not None:
            # grad_inner holds the input of the second product now
            down.lora.add_gradients_of_pairs(sums_down, grad_inner, grad, pairs, weights)
        del grad_inner
        if up.lora is not None and sums_up is not None:
            up.lora.add_gradients_of_pairs(sums_up, hidden_TD[tokens], first, pairs, weights)
        rows = up.gradient(first, pairs, weights)
        del first
        torch.sum(rows.view(-1, chosen_TK.shape[1], rows.shape[1]), 1, out=grad_hidden_TD[tokens])
        del rows
        if down.bias is not None:
            grad_weights_TK[tokens] += (grad @ down.bias.t()).gather(1, chosen_TK[tokens])
    trained = [part for sums in (sums_up, sums_down) if sums is not None for part in sums.as_layer()]
    return grad_hidden_TD, grad_weights_TK.to(weights_TK.dtype), *trained


def _through_activation(activate, first, grad_inner, of_weights, inner_too: bool) -> None:
    """Put the gradient of a tile's first product in its place, and that of its pairs' weights in theirs.

    Neither has the router's weight in it yet, which the last product multiplies by.

    Args:
        inner_too: put the second product's input in the place of its gradient.
    """
    leaf = first.detach().requires_grad_()
    with torch.enable_grad():
        inner = activate(leaf)
    torch.sum(grad_inner * inner.detach(), -1, dtype=torch.float32, out=of_weights)
    (grad_first,) = torch.autograd.grad(inner, leaf, grad_inner)
    first.copy_(grad_first)
    if inner_too:
        grad_inner.copy_(inner.detach())
