"""The weight that quantising a merged one leaves, where the update beside it is still trained: ``train.merge_aware``.

    W' = Q(W + scale * B A)

A 4-bit base is on the grid that the merged weight is put back on, so that rounding to nearest gives W again for every
update below half a step: most of them. For NF4, Q is therefore stochastic: a weight moves to the next code with the
probability that makes the mean of its moves the update, and blocks keep their absmax. The random numbers are no state:
they are a hash of the weight's name, row and column, the same in every forward, in backward and in the merge, so that
W' is a function of W, A and B, and training sees the very codes that a merge writes. Q4_0 and Q8_0 have other grids
than the base: there Q is what llama.cpp's quantiser does, round to nearest.

W' is computed where W is dequantised, some rows at a time; beside what dequantising takes that is memory for one piece
and for the new codes, which a layer keeps for backward. The gradients of A and B are those of W + scale * B A
(straight-through).

The hash of row i and column j is the upper bits of a_i b_j mod 2^32, a and b hashes of their own: an outer product of
integers, a tenth of the time of a generator. As a matrix it is as flat in its spectrum as independent numbers; the
outer sums that quasi-random sequences are made of are waves, whose errors add up.

After training, the same codes can be had with less noise where inputs of the layer are known (``closest_codes``).

Shapes: W [out, in], A [r, in], B [out, r].
Source: straight-through gradients of quantised weights, arXiv 1308.3432 and 1712.05877; stochastic rounding, arXiv
1502.02551.
"""

from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from .bnb import functional as bnb
from .closest import GGUF_BLOCK, damped, descend
from .formats.gguf_blocks import GGUF_BLOCKS
from .nf4 import BLOCK_SIZE, Packed, absmax_of
from .pieces import pieces

OFF, NF4 = "off", "nf4"
AT_ONCE = 1 << 19  # weights; smaller pieces pay more for calls, larger ones leave a processor's cache
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
    there is none, and what would go beyond it stays there, as all does in a block of zeros.
    """
    (out, _), (_, columns) = lora_b.shape, lora_a.shape
    codes, half = packed.codes.view(out, columns // 2), columns // 2
    sizes = absmax_of(packed)  # below 0 of small blocks whose absmax are in 8 bits
    inverse = sizes.masked_fill(sizes.abs() < _SMALLEST_ABSMAX, torch.inf).reciprocal_().mul_(merging.scale)
    seed = crc32(merging.name.encode()) - 2**31
    of_rows = _hashes(out, seed, codes.device).bitwise_or_(1).unsqueeze(1)
    of_columns = _hashes(columns, ~seed, codes.device)
    steps, b = _inverse_steps(codes.device), lora_b.float()
    # two weights share a byte: those of even columns are computed with apart from those of odd ones
    apart = [(lora_a[:, side::2].float(), of_columns[side::2]) for side in (0, 1)]
    new, at_once = torch.empty_like(codes), AT_ONCE_GPU if codes.is_cuda else AT_ONCE
    rows = min(out, max(1, at_once // columns // BLOCK_SIZE) * BLOCK_SIZE)  # whole blocks
    numbers = torch.empty(2, rows, half, device=codes.device)  # memory that is new for each piece takes longer to get
    integers = torch.empty(2, rows, half, dtype=torch.int32, device=codes.device)
    for some in pieces(out, rows, codes.is_meta):
        old, sides = codes[some], []
        (moves, other), (places, index) = numbers[:, : len(old)], integers[:, : len(old)]
        places.copy_(old)
        for side, (a, hashes) in enumerate(apart):
            torch.mm(b[some], a, out=moves)
            _scale_blocks(moves.view(-1), inverse[some.start * columns // BLOCK_SIZE :])
            torch.bitwise_right_shift(moves.view(torch.int32), 31, out=index)  # -1 of a negative number, else 0
            index.bitwise_and_(256).add_(places)
            torch.index_select(steps[side], 0, index.view(-1), out=other.view(-1))
            moves.mul_(other)
            torch.mul(of_rows[some], hashes, out=index)
            moves.add_(other.copy_(index), alpha=2.0**-32).round_().clamp_(-15, 15)
            number = old >> 4 if side == 0 else old & 15
            sides.append(moves.to(torch.int8).add_(number.view(torch.int8)).clamp_(0, 15).view(torch.uint8))
        torch.bitwise_or(sides[0] << 4, sides[1], out=new[some])
    return packed._replace(codes=new.view_as(packed.codes))


def closest_codes(merging: Merging, packed: Packed, lora_a: Tensor, lora_b: Tensor, gram: Tensor) -> Packed:
    """Return an NF4 weight with codes whose products with given inputs X are near to those of W + scale * B A.

    It begins with ``merged_codes``, see ``quant.closest``. Beside the codes this takes memory for five of the weight in
    float32.

    Args:
        gram: X^T X, float32 [in, in]; left as it is.
    """
    (out, _), columns = lora_b.shape, lora_a.shape[1]
    table = bnb.get_4bit_type("nf4", device=gram.device)
    borders = (table[1:] + table[:-1]) / 2
    size = absmax_of(packed).repeat_interleave(BLOCK_SIZE)[: out * columns].view(out, columns).t().contiguous()
    size.masked_fill_(size.abs() < _SMALLEST_ABSMAX, _SMALLEST_ABSMAX)

    def values(of: Packed) -> Tensor:  # [in, out]
        numbers = torch.cat([of.codes >> 4, of.codes & 15], 1).view(-1)[: out * columns].view(out, columns)
        return table[numbers.t().contiguous().int()].mul_(size)

    weight = values(merged_codes(merging, packed, lora_a, lora_b))
    error = values(packed).addmm_(lora_a.float().t(), lora_b.float().t(), alpha=merging.scale).sub_(weight)
    descend(weight, error, damped(gram), _Nf4(table, borders, size))
    codes = torch.bucketize(weight / size, borders).t().to(torch.uint8).reshape(-1, 2)
    return packed._replace(codes=(codes[:, 0] << 4 | codes[:, 1]).unsqueeze(1))


class _Nf4(NamedTuple):
    """The values of NF4 in blocks whose absmax stay.

    Args:
        borders: halfway between the values of ``table``, [15].
        size: absmax of each weight, [in, out].
    """

    table: Tensor
    borders: Tensor
    size: Tensor

    def nearest(self, column: int, wanted: Tensor) -> Tensor:
        return self.table[torch.bucketize(wanted / self.size[column], self.borders)] * self.size[column]

    def refit(self, column: int, weight: Tensor, missing: Tensor, gram: Tensor) -> None:
        pass


def _scale_blocks(halves: Tensor, factors: Tensor) -> None:
    """Multiply every other weight of each block [n] by the block's factor; the last block may be incomplete."""
    whole, size = len(halves) // (BLOCK_SIZE // 2), BLOCK_SIZE // 2
    halves[: whole * size].view(whole, size).mul_(factors[:whole, None])
    halves[whole * size :].mul_(factors[whole : whole + 1])


def _inverse_steps(device: torch.device) -> Tensor:
    """Return one over the step from a code of NF4 to the next one up, and behind those of all to the next one down.

    By the byte that two codes share, of the first of them and of the second, [2, 512]; 0 where there is no next one.
    """
    table, byte = bnb.get_4bit_type("nf4", device=device), torch.arange(256, device=device)
    steps, none = table.diff().reciprocal(), table.new_zeros(1)
    codes = torch.stack([byte >> 4, byte & 15])
    return torch.cat([torch.cat([steps, none])[codes], torch.cat([none, steps])[codes]], 1)


def _hashes(count: int, seed: int, device: torch.device) -> Tensor:
    """Return a hash of each number below a count, int32 [count]: murmur3's last steps."""
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(-1640531535).add_(seed)
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x.bitwise_xor_(x >> shift).mul_(factor)
    return x.bitwise_xor_(x >> 16)


def merged_blocks(merging: Merging, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Return W + scale * B A in the blocks of a GGUF file, uint8 [out, in / 32 * bytes of a block].

    Args:
        weight: [out, in], any float type, in whole blocks of 32; left as it is.
    """
    out, columns = weight.shape
    quantized, size = GGUF[merging.to], GGUF_BLOCKS[merging.to].block_bytes
    found = torch.empty(out, columns // GGUF_BLOCK * size, dtype=torch.uint8, device=weight.device)
    at_once = max(1, (AT_ONCE_GPU if weight.is_cuda else AT_ONCE) // columns)
    a, b = lora_a.float(), lora_b.float()
    for some in pieces(out, at_once, weight.is_meta):
        rows = torch.addmm(weight[some].float(), b[some], a, alpha=merging.scale)
        quantized(rows.view(-1, GGUF_BLOCK), found[some].view(-1, size))
    return found


def _q4_0(weights: Tensor, blocks: Tensor) -> None:
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))
    step = largest.div_(-8)
    inverse = torch.where(step == 0, 0.0, step.reciprocal())
    codes = (weights * inverse).add_(8.5).clamp_(0, 15).byte()  # which leaves the fraction out
    _store(step, blocks)
    torch.bitwise_or(codes[:, :16], codes[:, 16:] << 4, out=blocks[:, 2:])


def _q8_0(weights: Tensor, blocks: Tensor) -> None:
    step = weights.abs().amax(1, keepdim=True).div_(127)
    scaled = weights * torch.where(step == 0, 0.0, step.reciprocal())
    _store(step, blocks)
    blocks[:, 2:].view(torch.int8).copy_(scaled.abs().add_(0.5).floor_().copysign_(scaled))


def _store(step: Tensor, blocks: Tensor) -> None:
    blocks[:, :2].copy_(step.half().view(torch.uint8))


GGUF = {"q4_0": _q4_0, "q8_0": _q8_0}
