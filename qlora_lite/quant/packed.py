"""A module that holds one packed weight: the parts that its format lists as buffers."""

from collections.abc import Sequence

import torch
from torch import nn

from .formats import FORMATS
from .nf4 import Packed
from .product import WeightSpec


class PackedWeight(nn.Module):
    """A frozen weight in a format of ``quant.formats``: the buffer ``weight`` has the codes, others the constants.

    Args:
        shape: the weight's, before packing.
        quant_type: name of the format.
        double_quant: constants in 8 bits too, see ``Format.parts``.
    """

    weight: torch.Tensor

    def __init__(self, shape: Sequence[int], quant_type: str, double_quant: bool, device=None):
        super().__init__()
        self.shape, self.quant_type, self.double_quant = tuple(shape), quant_type, double_quant
        for name, (dtype, size) in FORMATS[quant_type].parts(shape, double_quant).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))

    @property
    def packed(self) -> Packed:
        """The stored tensors of an NF4 or FP4 weight as the tuple that ``quant.nf4`` works on."""
        return Packed(*self.described[1])

    @property
    def described(self) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
        """The weight as spec and tensors, see ``quant.product``."""
        tensors = tuple(tensor for tensor in self._buffers.values() if tensor is not None)
        return WeightSpec(self.shape, self.quant_type), tensors

    def set_packed(self, packed: Sequence[torch.Tensor | None]) -> None:
        """Take over packed tensors of this weight's shape, in the order of its format's parts, without a copy."""
        stored = [tensor for tensor in packed if tensor is not None]
        for name, value in zip(list(self._buffers), stored, strict=True):
            setattr(self, name, value)

    def _apply(self, fn, recurse=True):
        """Move as torch does for ``to``, ``half`` and others, and let no stored tensor change its type.

        Kernels read the constants as float32, whatever they are.
        """
        _, stored = self.described
        super()._apply(fn, recurse)
        for (name, moved), tensor in zip(list(self._buffers.items()), stored, strict=True):
            if moved is not None and moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
