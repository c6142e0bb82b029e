"""Multiply a few rows by a packed weight without dequantising it first: what every token of generation needs.

Dequantising a weight moves 4.6 bytes for each of its numbers (half a byte read, two written, two read by the
product), whatever the number of rows. bitsandbytes' fused kernels read the half byte and no more. They round more than
the plain way does: the product, before anything is added to it; on a CPU the absmax values, at most 1.6 times the error
against float64; on a GPU, of up to three rows (on many GPUs four), every number that is summed. They have no
gradient, so they are for use and not for training.

On a GPU the operator takes the packed weight as it is, double quantisation included. It may dequantise it inside, so a
plan, whose tensors are on no device, takes the plain way and counts a dequantised weight. A CPU's operator wants
another order of the codes (32 rows of the weight side by side) and the maxima in bfloat16, so its weights are arranged
once, beside the packed ones: 4.25 more bits a weight, for products of a block of SmolLM2 that are 8 times as fast with
one row, 7 with four, 1.2 with 32 (two cores of an EPYC; ``tools/experiments/adapters``). It needs AVX512-BF16; without
that, the operator of the same name would take the arranged codes for packed ones. Training arranges nothing: its plan
has no room for a second form of the weights.

Both are kept away from rows that are not made of whole blocks, which bitsandbytes' CPU kernels have got wrong before
(see ``quant.nf4.dequantize``).

Shapes: x [..., in], weight [out, in], y [..., out]; rows are the product of x's leading dimensions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from .bnb import functional as bnb
from .nf4 import BLOCK_SIZE, Packed, absmax_of, dequantize, quantize

# Most rows for which the fused operator is taken. On a GPU it decides by itself, by what was measured on each chip,
# whether its kernel or dequantisation is faster; with 513 rows it dequantises every weight of 4 million numbers or more
# (bitsandbytes 0.50, _gemm_4bit_use_custom_cuda), as the plain way does, which rounds once less. On a CPU: with 32 rows
# it was 1.2 times as fast without a matrix unit and 0.8 times with one (AMX), with 16 rows 1.3 times with it
# (``tools/experiments/adapters``).
MAX_ROWS = {"cuda": 512, "cpu": 16}
MAX_ERROR = 0.05  # relative, of a product in the right order: rounding to bfloat16 is 0.5 %, another order 100 %
_SIDE_BY_SIDE = 32  # rows of the weight that lie together in the CPU kernel's order


class Arranged(NamedTuple):
    """A packed weight in the order of bitsandbytes' CPU kernel."""

    codes: torch.Tensor  # uint8 [out, in / 2]
    absmax: torch.Tensor  # bfloat16 [in / 64, out]
    table: torch.Tensor  # float32 [16], the 4-bit type's values


def can_arrange(shape: Sequence[int], device: torch.device) -> bool:
    """Return whether the CPU at hand has a fused kernel for weights of a shape [out, in]."""
    out_features, in_features = shape
    whole = out_features % _SIDE_BY_SIDE == 0 and in_features % BLOCK_SIZE == 0
    return whole and device.type == "cpu" and bool(bnb.has_avx512bf16())


def arranged_bytes(shape: Sequence[int]) -> int:
    """Return the memory of an arranged weight of a shape [out, in]."""
    out_features, in_features = shape
    return out_features * in_features // 2 + 2 * out_features * in_features // BLOCK_SIZE


def arrange(packed: Packed, shape: Sequence[int], quant_type: str) -> Arranged:
    """Put a packed weight into the order of the CPU kernel.

    Of 32 rows, two neighbouring columns at a time: byte 2 i + p holds column p of row i in its low half and of row
    i + 16 in its high half.

    Args:
        packed: from ``quantize``.
        shape: the weight's, [out, in], for which ``can_arrange`` holds.
        quant_type: the one it was packed with.
    """
    out_features, in_features = shape
    codes = packed.codes.view(out_features // _SIDE_BY_SIDE, 2, _SIDE_BY_SIDE // 2, in_features // 2)
    low, high = codes[:, 0], codes[:, 1]
    columns = torch.stack(((high & 0xF0) | (low >> 4), (high << 4) | (low & 0x0F)), dim=-1)
    absmax = absmax_of(packed).view(out_features, in_features // BLOCK_SIZE)
    return Arranged(
        columns.transpose(1, 2).reshape(out_features, in_features // 2),
        absmax.t().to(torch.bfloat16).contiguous(),
        bnb.get_4bit_type(quant_type, device="cpu"),
    )


@cache
def kernel_takes_our_order() -> bool:
    """Return whether the CPU kernel's order is that of ``arrange``: it is bitsandbytes' own and not promised."""
    shape, generator = (2 * _SIDE_BY_SIDE, 2 * BLOCK_SIZE), torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(torch.bfloat16) for size in ((1, shape[1]), shape))
    weight.view(-1, BLOCK_SIZE).mul_(torch.arange(1, 4 * _SIDE_BY_SIDE + 1).unsqueeze(1))  # no two blocks are alike
    packed = quantize(weight)
    expected = x.float() @ dequantize(packed, shape, torch.float32).t()
    found = cpu_product(x, arrange(packed, shape, "nf4"), shape).float()
    return bool((found - expected).norm() <= MAX_ERROR * expected.norm())


_plain: ContextVar[bool] = ContextVar("plain products only", default=False)


@contextmanager
def plain_products() -> Iterator[None]:
    """Have few rows multiplied as many are in training: rounded when the update of LoRA has been added."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def few(x: torch.Tensor) -> bool:
    """Return whether x has so few rows that its device's fused product is faster than the plain one, and may be
    used."""
    return not _plain.get() and 0 < x.numel() <= MAX_ROWS.get(x.device.type, 0) * x.shape[-1]


def cpu_product(x: torch.Tensor, arranged: Arranged, shape: Sequence[int]) -> torch.Tensor:
    """Return ``x W^T`` of an arranged weight; x is bfloat16."""
    return torch.ops.bitsandbytes.gemv_4bit(
        x.contiguous(), arranged.codes, shape, arranged.absmax, arranged.table, BLOCK_SIZE
    )


def gpu_product(x: torch.Tensor, packed: Packed, shape: Sequence[int], quant_type: str) -> torch.Tensor:
    """Return ``x W^T`` of a packed weight on a GPU; a row of the weight is made of whole blocks."""
    double = packed.absmax_code is not None
    return torch.ops.bitsandbytes.gemm_4bit(
        x,
        packed.codes,
        shape,
        packed.absmax_scale if double else packed.absmax,
        BLOCK_SIZE,
        quant_type,
        absmax_8bit=packed.absmax if double else None,
        absmax_code=packed.absmax_code,
        absmax_offset=packed.absmax_offset,
    )
