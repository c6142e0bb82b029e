"""MXFP4 as gpt-oss publishes its experts: codes of 4 bits, and a power of two for each 32 of a row; 4.25 bits a weight.

A code is a sign, two bits of exponent and one of mantissa. The low half of a byte is the first of two weights. A scale
is a byte: the exponent plus 127.

Shapes: ``weight``, the codes, uint8 [..., out, in / 32, 16]; ``scales`` uint8 [..., out, in / 32].
Source: OCP Microscaling Formats (MX) Specification 1.0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.quant.pieces import pieces, some_of

AT_ONCE = 1 << 16  # blocks, whose weights take 8 MiB in float32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """See the module."""

    about: str = "mxfp4 codes as published"
    block: int = 32

    def parts(self, shape: Sequence[int], double_quant: bool = False) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See ``Format``."""
        *rows, row = shape
        blocks = (*rows, row // self.block)
        return {"weight": (torch.uint8, (*blocks, self.block // 2)), "scales": (torch.uint8, blocks)}

    def dequantize(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        weight = torch.empty(tuple(shape), dtype=dtype, device=tensors[0].device)
        codes, scales = tensors[0].reshape(-1, self.block // 2), tensors[1].reshape(-1, 1)
        values = torch.tensor(_VALUES, device=codes.device)
        values = torch.cat((values, -values))
        pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), 1).view(torch.int64).view(-1)  # of bytes
        found = weight.view(-1, self.block)
        for some in pieces(len(codes), AT_ONCE, codes.is_meta):
            both = pairs.index_select(0, codes[some].reshape(-1).int()).view(torch.float32).view(-1, self.block)
            found[some].copy_(torch.ldexp(both, scales[some].int() - _BIAS))
            del both  # before the next
        return weight

    def dequantize_rows(
        self, tensors: Sequence[Tensor], shape: Sequence[int], rows: slice | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``Format``."""
        return some_of(self.dequantize, tensors, shape, rows, dtype)


MXFP4 = {"mxfp4": Mxfp4()}
