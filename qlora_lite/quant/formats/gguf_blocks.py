"""The block formats of GGUF files, codes as the file has them: what llama.cpp computes with is what is trained on.

A row is cut into blocks of 32 or 256 weights. A block holds its codes and, between them, its constants: a scale in
float16, with a minimum in types that have one; in the K types, for each 16 or 32 weights a scale (and minimum) of 6 or
8 bits that multiplies the block's. 4.5 (Q4_0, Q4_K), 5 (Q4_1), 5.5 (Q5_0, Q5_K), 6 (Q5_1), 6.56 (Q6_K) and 8.5 (Q8_0)
bits a weight.

Codes are taken apart by torch's operators on bytes, on any device, some rows at a time, so that no float32 copy of a
whole weight is made. The arithmetic is float32 in the order of llama.cpp's reference: the result equals that of the
``gguf`` package byte for byte (``tests/quant/test_gguf_blocks.py``).

Shapes: the one part is ``weight``, uint8 [out, in / block * bytes of a block]; below, blocks [n, bytes of a block].
Source: llama.cpp, ggml-common.h and ggml-quants.c.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.quant.pieces import pieces, some_of

AT_ONCE = 1 << 21  # weights, which take 8 MiB in float32
_LOW = 0x0F0F0F0F0F0F0F0F  # the low halves of eight bytes


def _halves(codes: Tensor) -> Tensor:
    """Return the low halves of bytes [..., n], then the high ones, [..., 2 n]; eight at a time."""
    eight = codes.clone(memory_format=torch.contiguous_format).view(torch.int64)
    return torch.cat((eight & _LOW, (eight >> 4) & _LOW), -1).view(torch.uint8)


def _bits(codes: Tensor, each: int) -> Tensor:
    """Return the numbers of ``each`` bits in bytes [..., n], the lowest first, [..., 8 / each, n]."""
    shifts = torch.arange(0, 8, each, dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(-2) >> shifts[:, None]) & ((1 << each) - 1)


def _half(blocks: Tensor, place: int) -> Tensor:
    """Return the float16 number at a byte of each block in float32, [n, 1]."""
    return blocks[:, place : place + 2].view(torch.float16).float()


def _fifth_bits(blocks: Tensor, place: int) -> Tensor:
    """Return the bits of four bytes of each block as fifth bits of 32 codes, uint8 [n, 32].

    They are looked up, all eight of a byte as one number, which takes a fortieth of the time of shifts.
    """
    table = (_bits(torch.arange(256, dtype=torch.uint8, device=blocks.device), 1) << 4).t().contiguous()
    numbers = blocks[:, place : place + 4].reshape(-1).int()
    return table.view(torch.int64).view(-1).index_select(0, numbers).view(torch.uint8).view(-1, 32)


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _halves(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _halves(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of each 32 weights of Q4_K and Q5_K in float32, both [n, 8, 1].

    They are of 6 bits: the low ones of the first four lie in bytes 4 to 11, above them 2 bits of the last four.
    """
    scales, minima, low = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scale = torch.cat((scales & 63, (low & 15) | ((scales >> 2) & 48)), 1).float().mul_(_half(blocks, 0))
    minimum = torch.cat((minima & 63, (low >> 4) | ((minima >> 2) & 48)), 1).float().mul_(_half(blocks, 2))
    return scale.unsqueeze(2), minimum.unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    codes = _halves(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32)
    return codes.float().mul_(scale).sub_(minimum)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    codes = _halves(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32) | (_bits(blocks[:, 16:48], 1) << 4)
    return codes.float().mul_(scale).sub_(minimum)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _halves(blocks[:, :128].unflatten(1, (2, 64)))
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).flatten(2)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return (low | (high << 4)).view(-1, 16, 16).float().sub_(32).mul_(scale.unsqueeze(2))


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """One of GGUF's types: what its blocks hold, and in how many bytes.

    Args:
        values: returns a block's weights in float32, [n, ...], from blocks uint8 [n, block_bytes].
    """

    about: str
    block: int
    block_bytes: int
    values: Callable[[Tensor], Tensor]

    def parts(self, shape: Sequence[int], double_quant: bool = False) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See ``Format``; constants are stored as the type says."""
        *rows, row = shape
        return {"weight": (torch.uint8, (*rows, row // self.block * self.block_bytes))}

    def dequantize(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        weight = torch.empty(tuple(shape), dtype=dtype, device=tensors[0].device)
        stored, found = tensors[0].view(-1, self.block_bytes), weight.view(-1, self.block)
        for some in pieces(len(stored), AT_ONCE // self.block, stored.is_meta):
            found[some].copy_(self.values(stored[some]).view(-1, self.block))
        return weight

    def dequantize_rows(
        self, tensors: Sequence[Tensor], shape: Sequence[int], rows: slice | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``Format``."""
        return some_of(self.dequantize, tensors, shape, rows, dtype)


GGUF_BLOCKS = {
    name: GgufBlocks(f"{name} blocks as the GGUF file has them", block, block_bytes, values)
    for name, block, block_bytes, values in (
        ("q4_0", 32, 18, _q4_0),
        ("q4_1", 32, 20, _q4_1),
        ("q5_0", 32, 22, _q5_0),
        ("q5_1", 32, 24, _q5_1),
        ("q8_0", 32, 34, _q8_0),
        ("q4_k", 256, 144, _q4_k),
        ("q5_k", 256, 176, _q5_k),
        ("q6_k", 256, 210, _q6_k),
    )
}
