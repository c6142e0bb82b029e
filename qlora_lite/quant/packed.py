"""A module that holds one weight in 4 bits: the tensors of ``nf4.Packed`` as buffers."""

from collections.abc import Sequence

import torch
from torch import nn

from .nf4 import Packed, empty_packed
from .product import WeightSpec

PACKED_BUFFERS = ("weight", "absmax", "absmax_code", "absmax_scale", "absmax_offset")


class PackedWeight(nn.Module):
    """A frozen weight stored as NF4 or FP4 codes with its constants.

    The codes are the buffer ``weight`` (uint8 [ceil(weights / 2), 1]); with ``double_quant`` the absmax values are
    uint8 with a 256-entry code, otherwise float32.

    Args:
        shape: the weight's, before packing.
    """

    weight: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, shape: Sequence[int], quant_type: str, double_quant: bool, device=None):
        super().__init__()
        self.shape, self.quant_type, self.double_quant = tuple(shape), quant_type, double_quant
        for name, tensor in zip(PACKED_BUFFERS, empty_packed(shape, double_quant, device), strict=True):
            if tensor is not None:
                self.register_buffer(name, tensor)

    @property
    def packed(self) -> Packed:
        """The stored tensors as the tuple that ``quant.nf4`` works on."""
        return Packed(self.weight, self.absmax, *(getattr(self, name, None) for name in PACKED_BUFFERS[2:]))

    @property
    def described(self) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
        """The weight as spec and tensors, see ``quant.product``."""
        return WeightSpec(self.shape, self.quant_type), tuple(tensor for tensor in self.packed if tensor is not None)

    def set_packed(self, packed: Packed) -> None:
        """Take over packed tensors of this weight's shape, without a copy."""
        for name, value in zip(PACKED_BUFFERS, packed, strict=True):
            if value is not None:
                setattr(self, name, value)

    def _apply(self, fn, recurse=True):
        """Move as torch does for ``to``, ``half`` and others, and let no stored tensor change its type.

        Kernels read the constants as float32, whatever they are.
        """
        stored = self.packed
        super()._apply(fn, recurse)
        for name, tensor in zip(PACKED_BUFFERS, stored, strict=True):
            if tensor is not None and (moved := getattr(self, name)).dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
