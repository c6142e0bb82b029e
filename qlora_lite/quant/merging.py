"""The weight that quantising a merged one leaves, where the update beside it is still trained: ``train.merge_aware``.

    W' = Q(W + scale * B A)

A 4-bit base is on the grid that the merged weight is put back on, so that rounding to nearest gives W again for every
update below half a step: most of them. For NF4, Q is therefore stochastic: a weight moves to the next code with the
probability that makes the mean of its moves the update, and blocks keep their absmax. The random numbers are no state:
they are a hash of the weight's name, row and column, the same in every forward, in backward and in the merge, so that
W' is a function of W, A and B, and training sees the very codes that a merge writes. Q4_0 and Q8_0 have other grids
than the base: there Q is what llama.cpp's quantiser does, round to nearest.

W' is computed where W is dequantised, some rows at a time; beside what dequantising takes that is memory for the new
codes and for one piece. The gradients of A and B are those of W + scale * B A (straight-through).

The hash of row i and column j is the upper bits of a_i b_j mod 2^32, a and b hashes of their own: an outer product of
integers, a tenth of the time of a generator. As a matrix it is as flat in its spectrum as independent numbers; the
outer sums that quasi-random sequences are made of are waves, whose errors add up.

Shapes: W [out, in], A [r, in], B [out, r].
Source: straight-through gradients of quantised weights, arXiv 1308.3432 and 1712.05877; stochastic rounding, arXiv
1502.02551.
"""

from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from .bnb import functional as bnb
from .nf4 import BLOCK_SIZE, Packed, absmax_of
from .pieces import pieces

OFF, NF4 = "off", "nf4"
GGUF_BLOCK = 32  # weights of Q4_0 and Q8_0 that share a scale
AT_ONCE = 1 << 18  # weights, so that a processor's cache holds what is computed of them
AT_ONCE_GPU = 1 << 23
_SMALLEST_ABSMAX = 1e-38


class Merging(NamedTuple):
    """How an update is put into a weight.

    Args:
        to: "nf4", "q4_0" or "q8_0".
        scale: that B A is multiplied by.
        name: of the weight, which the random numbers of NF4 depend on.
    """

    to: str
    scale: float
    name: str


def merged_codes(merging: Merging, packed: Packed, lora_a: Tensor, lora_b: Tensor) -> Packed:
    """Return an NF4 weight with other codes: of W + scale * B A, rounded stochastically within the blocks' absmax.

    In units of codes, the update is the difference over the step to the next value on its side; from the last one on
    there is none, and what would go beyond it stays there.
    """
    (out, _), (_, columns) = lora_b.shape, lora_a.shape
    codes, half = packed.codes.view(out, columns // 2), columns // 2
    inverse = absmax_of(packed).clamp(min=_SMALLEST_ABSMAX).reciprocal_().mul_(merging.scale)
    seed = crc32(merging.name.encode()) - 2**31
    of_rows = _hashes(out, seed, codes.device).bitwise_or_(1).unsqueeze(1)
    of_columns = _hashes(columns, ~seed, codes.device)
    steps, b = _inverse_steps(codes.device), lora_b.float()
    # two weights share a byte: those of even columns are computed with apart from those of odd ones
    apart = [(lora_a[:, side::2].float(), of_columns[side::2]) for side in (0, 1)]
    new, at_once = torch.empty_like(codes), AT_ONCE_GPU if codes.is_cuda else AT_ONCE
    rows = max(1, at_once // columns // BLOCK_SIZE) * BLOCK_SIZE  # whole blocks
    for some in pieces(out, rows, codes.is_meta):
        old, sides = codes[some], []
        places = old.reshape(-1).int()
        for side, (a, hashes) in enumerate(apart):
            moves = b[some] @ a
            _scale_blocks(moves.view(-1), inverse[some.start * columns // BLOCK_SIZE :])
            up, down = (torch.index_select(table[side], 0, places).view(-1, half) for table in steps)
            up.mul_(moves.clamp(min=0))
            moves.clamp_(max=0).mul_(down).add_(up)
            moves.add_((of_rows[some] * hashes).float(), alpha=2.0**-32).round_().clamp_(-15, 15)
            number = old >> 4 if side == 0 else old & 15
            sides.append(moves.to(torch.int8).add_(number.view(torch.int8)).clamp_(0, 15).view(torch.uint8))
        torch.bitwise_or(sides[0] << 4, sides[1], out=new[some])
    return packed._replace(codes=new.view_as(packed.codes))


def _scale_blocks(halves: Tensor, factors: Tensor) -> None:
    """Multiply every other weight of each block [n] by the block's factor; the last block may be incomplete."""
    whole, size = len(halves) // (BLOCK_SIZE // 2), BLOCK_SIZE // 2
    halves[: whole * size].view(whole, size).mul_(factors[:whole, None])
    halves[whole * size :].mul_(factors[whole : whole + 1])


def _inverse_steps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return one over the step to the next larger value of NF4, and to the next smaller one; 0 where there is none.

    By the byte that two codes share, for the first of them and for the second, [2, 256].
    """
    table, byte = bnb.get_4bit_type("nf4", device=device), torch.arange(256, device=device)
    steps, none = table.diff().reciprocal(), table.new_zeros(1)
    codes = torch.stack([byte >> 4, byte & 15])
    return torch.cat([steps, none])[codes], torch.cat([none, steps])[codes]


def _hashes(count: int, seed: int, device: torch.device) -> Tensor:
    """Return a hash of each number below a count, int32 [count]: murmur3's last steps."""
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(-1640531535).add_(seed)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x.bitwise_xor_(x >> shift).mul_(factor)
    return x.bitwise_xor_(x >> 16)


def merged_blocks(merging: Merging, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W + scale * B A as a reader gets it from the blocks of a GGUF file.

    Args:
        weight: [out, in], any float type, in whole blocks of 32; left as it is.
    """
    found, quantized = torch.empty(weight.shape, dtype=dtype, device=weight.device), GGUF[merging.to]
    at_once = max(1, (AT_ONCE_GPU if weight.is_cuda else AT_ONCE) // weight.shape[1])
    a, b = lora_a.float(), lora_b.float()
    for some in pieces(len(weight), at_once, weight.is_meta):
        rows = torch.addmm(weight[some].float(), b[some], a, alpha=merging.scale)
        found[some] = quantized(rows.view(-1, GGUF_BLOCK)).view_as(rows)
    return found


def _q4_0(blocks: Tensor) -> Tensor:
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = largest.div_(-8)
    inverse = torch.where(step == 0, 0.0, step.reciprocal())
    codes = (blocks * inverse).add_(8.5).trunc_().clamp_(0, 15)
    return codes.sub_(8).mul_(step.half().float())


def _q8_0(blocks: Tensor) -> Tensor:
    step = blocks.abs().amax(1, keepdim=True).div_(127)
    scaled = blocks * torch.where(step == 0, 0.0, step.reciprocal())
    codes = scaled.abs().add_(0.5).floor_().copysign_(scaled)
    return codes.mul_(step.half().float())


GGUF = {"q4_0": _q4_0, "q8_0": _q8_0}
