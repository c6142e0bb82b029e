"""The packed formats that a frozen weight may be stored in, by name: one registry, one file for each kind of format.

Everything else takes a weight's format from here and knows none by name: a module holds the parts that its format lists
as buffers, so that they are placed, streamed, counted and planned like any tensor, and a product dequantises them where
it needs the weight. A further format is one more file with the class of one, and its line in ``FORMATS``.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from .four_bit import FOUR_BIT
from .gguf_blocks import GGUF_BLOCKS
from .grouped import GROUPED
from .mxfp4 import MXFP4
from .scaled import SCALED

Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


class Format(Protocol):
    """How a weight is packed: ``about`` in a few words for the inventory, in blocks of so many numbers of a row."""

    @property
    def about(self) -> str: ...
    @property
    def block(self) -> int: ...

    def parts(self, shape: Sequence[int], double_quant: bool = False) -> Parts:
        """Return what holds a weight of a shape, in the order in which the other functions take it.

        The first part is called ``weight`` and has the codes.

        Args:
            double_quant: store the constants of blocks in 8 bits too, where the format knows that.
        """

    def dequantize(self, tensors: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, contiguous: computed in float32 and rounded once.

        Args:
            tensors: the parts.
            shape: of the weight, [out, in]; or [E, out, in] of those of E experts together.
        """

    def dequantize_rows(
        self, tensors: Sequence[torch.Tensor], shape: Sequence[int], rows: slice | torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return rows of a weight [out, in], or weights of experts of [E, out, in], without dequantising others.

        Args:
            rows: slice, or numbers int64 [n], along the first dimension.
        """


FORMATS: Mapping[str, Format] = {**FOUR_BIT, **GGUF_BLOCKS, **MXFP4, **SCALED, **GROUPED}
