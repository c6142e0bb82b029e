"""Codes of 8 bits that a scale multiplies: bitsandbytes' int8, and FP8 in blocks as DeepSeek and Qwen publish it.

int8 has a scale for each row, its largest magnitude, of which a code is so many 127ths. FP8 (E4M3) has one for each
block of 128 by 128 weights, those at the edges smaller. Rows are dequantised some at a time in float32.

Shapes: ``weight``, the codes, [out, in]; ``scales`` float32 [out], or [ceil(out / 128), ceil(in / 128)]; of E experts
together each with a dimension E before the others.
Source: LLM.int8(), arXiv 2208.07339, section 2; DeepSeek-V3, arXiv 2412.19437, section 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.quant.pieces import by_rows, some_of


@dataclass(frozen=True, slots=True)
class Scaled:
    """Codes of a type with scales of blocks.

    Args:
        sides: rows and columns that share a scale; None are rows with one each.
        unit: what a product of code and scale is multiplied by; None for 1.
    """

    about: str
    dtype: torch.dtype
    sides: tuple[int, int] | None
    unit: float | None = None
    block: int = 1

    def parts(self, shape: Sequence[int], double_quant: bool = False) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See ``Format``."""
        *experts, out, width = shape
        if self.sides is None:
            scales: tuple[int, ...] = (out,)
        else:
            scales = tuple(-(-size // side) for size, side in zip((out, width), self.sides, strict=True))
        return {"weight": (self.dtype, tuple(shape)), "scales": (torch.float32, (*experts, *scales))}

    def dequantize(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        return by_rows(self.dequantize_rows, tensors, shape, dtype)

    def dequantize_rows(
        self, tensors: Sequence[Tensor], shape: Sequence[int], rows: slice | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``Format``."""
        if len(shape) == 3:
            return some_of(self.dequantize, tensors, shape, rows, dtype)
        codes, scales = tensors
        values = codes[rows].float()
        if self.sides is None:
            values.mul_(scales[rows].unsqueeze(1))
        else:
            high, wide = self.sides
            numbers = torch.arange(shape[0], device=codes.device)[rows] // high
            values.mul_(scales[numbers].repeat_interleave(wide, 1)[:, : shape[1]])
        return (values if self.unit is None else values.mul_(self.unit)).to(dtype)


SCALED = {
    "int8": Scaled("int8 codes as published", torch.int8, None, 7.874015718698502e-3),  # bitsandbytes' 1 / 127
    "fp8_128x128": Scaled("fp8 (E4M3) codes as published", torch.float8_e4m3fn, (128, 128)),
}
