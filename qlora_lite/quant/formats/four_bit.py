"""NF4 and FP4, as ``quant.nf4`` packs them; the only formats that weights are quantised to here."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from qlora_lite.quant.nf4 import BLOCK_SIZE, Packed, dequantize, dequantize_rows, empty_packed

NAMES = ("weight", "absmax", "absmax_code", "absmax_scale", "absmax_offset")  # of the parts of ``Packed``


@dataclass(frozen=True, slots=True)
class FourBit:
    """One of bitsandbytes' 4-bit types, see ``quant.nf4``; the last three parts are those of double quantisation."""

    quant_type: str
    block: int = BLOCK_SIZE

    @property
    def about(self) -> str:
        """See ``Format``."""
        return f"{self.quant_type} codes, two per byte"

    def parts(self, shape: Sequence[int], double_quant: bool = False) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See ``Format``."""
        tensors = zip(NAMES, empty_packed(shape, double_quant, "meta"), strict=True)
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors if tensor is not None}

    def dequantize(self, tensors: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See ``Format``."""
        return dequantize(Packed(*tensors), shape, dtype, self.quant_type)

    def dequantize_rows(
        self, tensors: Sequence[torch.Tensor], shape: Sequence[int], rows: slice | torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """See ``Format``; a row, or an expert's weight, is made of whole blocks."""
        count, *each = shape
        found = dequantize_rows(Packed(*tensors), (count, prod(each)), rows, dtype, self.quant_type)
        return found.view(-1, *each)


FOUR_BIT = {name: FourBit(name) for name in ("nf4", "fp4")}
