"""Multiply rows by the weights of their experts, the rows of all experts of a group in one launch; and sum up what
their LoRA weights learn.

Which rows an expert gets is known on the device alone: the host starts the same kernel whatever the router chose, and
waits for nothing. A row of the result is that of a pair of a token and an expert and lies where the pair does in
[T, K], flattened, so that nothing has to be sorted or added up in an order that changes.

On a GPU Triton kernels compute it (``grouped_kernel``), elsewhere a loop over the experts: the oracle of its tests.
torch's own ``grouped_mm`` is fused on compute capability 9.0 and 10.0 alone, and wants all experts' weights at once.
"""

import importlib
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from qlora_lite.memory.work import FLOP_FORMULAS


class Pairs(NamedTuple):
    """Pairs of a token and an expert, by expert: P = T K of them, of E experts.

    Args:
        places: of the pairs in the flattened [T, K], those of the first expert first, int64 [P].
        offsets: where each expert's begin in ``places``, and the end, int64 [E + 1].
    """

    places: torch.Tensor
    offsets: torch.Tensor


def pairs_by_expert(chosen_TK: torch.Tensor, experts: int) -> Pairs:
    """Sort the pairs of tokens and chosen experts, without a wait for the device."""
    numbers, places = chosen_TK.flatten().sort(stable=True)
    first = torch.arange(experts + 1, dtype=numbers.dtype, device=numbers.device)
    return Pairs(places, torch.searchsorted(numbers, first))


@torch.library.custom_op("qlora_lite::grouped_product", mutates_args=("out",))
def grouped_product(
    out: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor,
    offsets: torch.Tensor,
    first: int,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    add: bool = False,
) -> None:
    """Write ``scale * (weight @ row + bias)`` of the pairs of a group of experts; leave the others' rows alone.

    Sums are float32, and rounded once.

    Args:
        out: [P, O], contiguous.
        rows: [T, I] of the tokens, or [P, I] of the pairs, contiguous, in the type of ``out``.
        weights: [n, O, I] of the group, any strides, in the type of ``out``.
        places, offsets: see ``Pairs``.
        first: number of the group's first expert.
        bias: [E, O] of all experts.
        scale: [P], by place.
        add: what stands in the rows of ``out`` is added to the product, before all else.
    """
    if rows.is_cuda:
        importlib.import_module("qlora_lite.kernels.grouped_kernel").launch(
            out, rows, weights, places, offsets, first, bias, scale, add
        )
    else:
        one_by_one(out, rows, weights, places, offsets, first, bias, scale, add)


@grouped_product.register_fake
def _(out, rows, weights, places, offsets, first, bias=None, scale=None, add=False):
    return None


def one_by_one(out, rows, weights, places, offsets, first, bias=None, scale=None, add=False) -> None:
    """Do what ``grouped_product`` does, expert by expert."""
    rows_of_token = len(places) // len(rows)
    ends = offsets[first : first + len(weights) + 1].tolist()
    for number, weight in enumerate(weights):
        own = places[ends[number] : ends[number + 1]]
        y = linear(rows[own // rows_of_token].float(), weight.float())
        y = y + out[own] if add else y
        y = y if bias is None else y + bias[first + number]
        out[own] = (y if scale is None else y * scale[own, None]).to(out.dtype)


def _flops(out, rows, weights, places, offsets, *_others, **_unused) -> int:
    """Count the group's share of all pairs: which are its own is not known."""
    return 2 * len(places) * weights.numel() // (len(offsets) - 1)


FLOP_FORMULAS[torch.ops.qlora_lite.grouped_product] = _flops


@torch.library.custom_op("qlora_lite::add_grouped_sums", mutates_args=("out",))
def add_grouped_sums(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, places: torch.Tensor, offsets: torch.Tensor
) -> None:
    """Add ``left_row^T right_row`` of each expert's pairs to what it has in ``out``; in float32, rounded once.

    Args:
        out: [E, M, N], contiguous.
        left, right: [T or P, M] and [T or P, N] of the tokens or of the pairs, contiguous, in the type of ``out``.
        places, offsets: see ``Pairs``.
    """
    if out.is_cuda:
        importlib.import_module("qlora_lite.kernels.grouped_kernel").launch_sums(out, left, right, places, offsets)
    else:
        sums_one_by_one(out, left, right, places, offsets)


@add_grouped_sums.register_fake
def _(out, left, right, places, offsets):
    return None


def sums_one_by_one(out, left, right, places, offsets) -> None:
    """Do what ``add_grouped_sums`` does, expert by expert."""
    of_left, of_right, ends = len(places) // len(left), len(places) // len(right), offsets.tolist()
    for number, sums in enumerate(out):
        own = places[ends[number] : ends[number + 1]]
        sums += left[own // of_left].float().t() @ right[own // of_right].float()


def _flops_of_sums(out, left, right, places, *_others, **_unused) -> int:
    return 2 * len(places) * out.shape[1] * out.shape[2]


FLOP_FORMULAS[torch.ops.qlora_lite.add_grouped_sums] = _flops_of_sums
