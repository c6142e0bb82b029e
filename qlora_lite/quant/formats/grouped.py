"""GPTQ's and AWQ's codes: 4 or 8 bits in words of 32, with a scale and a zero for each group of a row's weights.

A weight is ``scale * (code - zero)``. GPTQ packs neighbours of a row into a word, and names each column's group, which
with act-order is any; its first format stores zeros less one. AWQ packs 8 rows into a word, in the order 0, 2, 4, 6, 1,
3, 5, 7. Both store weights [in, out]. Rows are dequantised some at a time in float32: plain operators, on any device,
where the libraries of both have kernels that multiply packed weights.

Shapes: ``weight``, the codes, int32 [in * bits / 32, out], of AWQ [in, out / 8]; ``zeros`` int32
[groups, out * bits / 32]; ``scales`` float16 [groups, out]; ``group`` int32 [in], of GPTQ; of E experts together each
with a dimension E before the others.
Source: GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978; the layouts of AutoGPTQ and AutoAWQ (GEMM).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.quant.pieces import by_rows, some_of

_WORD = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of 8 rows in a word


@dataclass(frozen=True, slots=True)
class Grouped:
    """Codes of groups.

    Args:
        group: weights of a row in one; None for all of a row.
        above: what is added to zeros.
        is_awq: the layout is AWQ's.
    """

    about: str
    bits: int
    group: int | None
    above: int = 0
    is_awq: bool = False
    block: int = 1

    def parts(self, shape: Sequence[int], double_quant: bool = False) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See ``Format``."""
        *experts, out, width = shape
        groups, words = -(-width // (self.group or width)), out * self.bits // _WORD
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.int32, (width, words) if self.is_awq else (width * self.bits // _WORD, out)),
            "zeros": (torch.int32, (groups, words)),
            "scales": (torch.float16, (groups, out)),
        }
        found |= {} if self.is_awq else {"group": (torch.int32, (width,))}
        return {name: (dtype, (*experts, *size)) for name, (dtype, size) in found.items()}

    def dequantize(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        return by_rows(self.dequantize_rows, tensors, shape, dtype)

    def dequantize_rows(
        self, tensors: Sequence[Tensor], shape: Sequence[int], rows: slice | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``Format``."""
        if len(shape) == 3:
            return some_of(self.dequantize, tensors, shape, rows, dtype)
        codes, zeros, scales, *of_columns = tensors
        numbers = torch.arange(shape[0], device=codes.device)[rows]
        if self.is_awq:
            values = self._across(codes, numbers)
        else:
            shifts = torch.arange(0, _WORD, self.bits, dtype=torch.int32, device=codes.device)
            values = ((codes[:, rows].unsqueeze(1) >> shifts[:, None]) & self._mask).flatten(0, 1)
        columns = torch.arange(shape[1], device=codes.device)
        groups = of_columns[0] if of_columns else columns // (self.group or shape[1])
        values = values.float().sub_((self._across(zeros, numbers) + self.above)[groups])
        return values.mul_(scales[:, rows].float()[groups]).t().to(dtype).contiguous()

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1

    def _across(self, words: Tensor, numbers: Tensor) -> Tensor:
        """Return the codes of rows of the weight from words [..., n] that hold those of several side by side."""
        each = _WORD // self.bits
        places = numbers % each
        if self.is_awq:
            places = torch.tensor(_AWQ_PLACES, device=words.device)[places]
        return (words[:, numbers // each] >> (places * self.bits).int()) & self._mask


_KINDS = ("gptq", 1, False, (4, 8)), ("gptq_v2", 0, False, (4, 8)), ("awq", 0, True, (4,))
GROUPED = {
    f"{name}_{bits}_{group or 'row'}": Grouped(f"{name} codes of {bits} bits as published", bits, group, above, is_awq)
    for name, above, is_awq, widths in _KINDS
    for bits in widths
    for group in (32, 64, 128, None)
}
