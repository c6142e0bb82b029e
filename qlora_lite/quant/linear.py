"""Frozen linear layers, 4-bit or not, behind one small interface.

A layer's weight is described by a ``WeightSpec`` and a flat tuple of plain tensors. Everything that
multiplies by a frozen weight takes this pair, so that 4-bit layers, 16-bit layers and GPT-2's transposed
``Conv1D`` share one code path, and so that autograd keeps the *packed* tensors through
``save_for_backward`` (tensors kept on ``ctx`` instead go stale silently when weights are streamed:
bitsandbytes issues 2034 and 2035). Nothing dequantised outlives the operation that needed it, unless
``keeping_weights`` says that it will be needed again at once.

``bitsandbytes.nn.Linear4bit`` is not used: it keeps the quantisation constants outside the module's
registers, rewrites its own weight during ``forward`` on CPUs, and its CPU training path was measured
seven times slower than dequantise-then-matmul.

Shapes: x [..., in], weight [out, in], y [..., out]; T is the product of x's leading dimensions.
Source: QLoRA, arXiv 2305.14314, section 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.memory.meter import free_bytes

from .few_rows import Arranged, arrange, arranged_bytes, can_arrange, card_product, cpu_product, few
from .nf4 import BLOCK_SIZE, Packed, dequantize, dequantize_rows, empty_packed, quantize

PACKED_BUFFERS = ("weight", "absmax", "absmax_code", "absmax_scale", "absmax_offset")
SPARED = 0.5  # of the free memory, that arranged weights leave to everything else


class WeightSpec(NamedTuple):
    """How a tuple of tensors becomes a weight [out, in].

    ``quant_type`` None means that the tuple holds the weight itself, stored [in, out] if ``transposed``.
    """

    shape: tuple[int, int]
    quant_type: str | None
    transposed: bool = False


class KeptWeights:
    """Unpacked weights that are going to be multiplied by again.

    Args:
        stay: they serve any number of products, as those of other tiles; else each goes with the gradient it is for.
    """

    def __init__(self, stay: bool):
        self.stay = stay
        self._weights: dict[tuple, torch.Tensor] = {}

    def weight(self, spec: WeightSpec, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype, again: bool):
        """Return a weight, unpacked or found, and keep it if it is needed ``again``."""
        key = tensors[0].untyped_storage()._cdata, tensors[0].storage_offset(), dtype
        weight = self._weights.pop(key, None)
        if weight is None:
            weight = materialize(spec, tensors, dtype)
        if again or self.stay:
            self._weights[key] = weight
        return weight


_kept: ContextVar[KeptWeights | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_weights(stay: bool) -> Iterator[None]:
    """Let the products inside keep their unpacked weights for their gradients, which may be computed outside.

    Args:
        stay: see ``KeptWeights``.
    """
    token = _kept.set(KeptWeights(stay))
    try:
        yield
    finally:
        _kept.reset(token)


def kept_for(x: torch.Tensor) -> KeptWeights | None:
    """Return where a product with x and its gradient find its unpacked weight; None where it would serve no other."""
    kept = None if torch.compiler.is_compiling() else _kept.get()  # torch.compile cannot trace a context variable
    return kept if kept is not None and (kept.stay or x.requires_grad) else None


def materialize(
    spec: WeightSpec, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype, kept: KeptWeights | None = None,
    again: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return the weight [out, in] in ``dtype``; a view of the stored tensor where that is possible.

    Args:
        kept: from ``kept_for``.
        again: it will be needed once more.
    """
    if spec.quant_type is not None:
        if kept is not None:
            return kept.weight(spec, tensors, dtype, again)
        packed = Packed(*tensors, *(None,) * (len(Packed._fields) - len(tensors)))
        return dequantize(packed, spec.shape, dtype, spec.quant_type)
    weight = tensors[0].to(dtype)
    return weight.t() if spec.transposed else weight


def add_product(
    addend: torch.Tensor, x: torch.Tensor, spec: WeightSpec, tensors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None, kept: KeptWeights | None = None, again: bool = False, of_gradient: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Add ``x @ weight.T + bias`` to ``addend`` [..., out] in place, and return it.

    The sum is rounded once, at the end of the product (but not under torch.compile; see ``product_beside``). Rounding
    the product first would swallow an addend below half a step of bf16 whole: the fate of a LoRA update in its first
    steps, measured as most of the learning lost.

    Args:
        kept, again: see ``materialize``.
        of_gradient: x is the gradient [..., out] of such a product; add ``x @ weight`` to ``addend`` [..., in].
    """
    rows, x = addend.view(-1, addend.shape[-1]), x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        rows.add_(_product(x, list(tensors), *_described(spec), of_gradient))
    else:
        weight = materialize(spec, tensors, x.dtype, kept, again)
        rows.addmm_(x, weight if of_gradient else weight.t())
    return addend if bias is None else addend.add_(bias)


def product_beside(
    low: torch.Tensor, factor: torch.Tensor, x: torch.Tensor, spec: WeightSpec, tensors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None, kept: KeptWeights | None, again: bool,
) -> torch.Tensor:  # fmt: skip
    """Return ``low @ factor.T + x @ weight.T + bias``, the sum of the products rounded once.

    Args:
        low, factor: [T, r] and [out, r].
        kept, again: see ``materialize``.
    """
    if not torch.compiler.is_compiling():
        y = nn.functional.linear(low.view(*x.shape[:-1], low.shape[-1]), factor)
        return add_product(y, x, spec, tensors, bias, kept, again)
    y = _product(x.reshape(-1, x.shape[-1]), list(tensors), *_described(spec), False, low, factor)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def _described(spec: WeightSpec) -> tuple[list[int], str | None, bool]:
    return list(spec.shape), spec.quant_type, spec.transposed


@torch.library.custom_op("qlora_lite::product", mutates_args=())
def _product(
    x: torch.Tensor, tensors: list[torch.Tensor], shape: list[int], quant_type: str | None, transposed: bool,
    of_gradient: bool, low: torch.Tensor | None = None, factor: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Multiply rows by a frozen weight as one operator, for torch.compile: what is unpacked is not its to keep.

    It gets nothing to add to in place: for a compiler that is another tensor, and a copy. Where weights are kept, the
    gradient is computed inside too, since it is part of the same graph (``ops.compiled.gradient_root``).
    """
    spec, kept, again = WeightSpec(tuple(shape), quant_type, transposed), _kept.get(), not of_gradient
    if low is not None:
        return product_beside(low, factor, x, spec, tuple(tensors), None, kept, again)
    weight = materialize(spec, tuple(tensors), x.dtype, kept, again)
    return x @ (weight if of_gradient else weight.t())


@_product.register_fake
def _(x, tensors, shape, quant_type, transposed, of_gradient, low=None, factor=None):
    return x.new_empty(x.shape[0], shape[of_gradient])


class FrozenMatmul(torch.autograd.Function):
    """Compute ``addend + x @ weight.T + bias`` for a weight that gets no gradient; backward rebuilds the weight."""

    @staticmethod
    def forward(ctx, x, addend, bias, spec, *tensors):
        ctx.spec, ctx.kept = spec, kept_for(x)
        ctx.save_for_backward(*tensors)
        if addend is None and not torch.compiler.is_compiling():
            return nn.functional.linear(x, materialize(spec, tensors, x.dtype, ctx.kept, again=True), bias)
        y = x.new_zeros(*x.shape[:-1], spec.shape[0]) if addend is None else addend.clone()
        return add_product(y, x, spec, tensors, bias, ctx.kept, again=True)

    @staticmethod
    def backward(ctx, grad_y):
        tensors = ctx.saved_tensors  # read once: with checkpointing the second access is an error
        if torch.compiler.is_compiling():
            grad_x = grad_y.new_zeros(*grad_y.shape[:-1], ctx.spec.shape[1])
            add_product(grad_x, grad_y, ctx.spec, tensors, of_gradient=True)
        else:
            grad_x = grad_y @ materialize(ctx.spec, tensors, grad_y.dtype, ctx.kept)
        grad_addend = grad_y if ctx.needs_input_grad[1] else None
        return grad_x, grad_addend, None, None, *(None for _ in tensors)


class QuantLinear(nn.Module):
    """A frozen linear layer whose weight [out, in] is stored as NF4 or FP4 codes with its constants.

    The codes are the buffer ``weight`` (uint8 [ceil(out * in / 2), 1]); with ``double_quant`` the block
    maxima are uint8 with a 256-entry code, otherwise float32. ``bias`` [out], if any, is a frozen parameter.
    ``replaces`` is the name of the class that stood here before; ``arranged`` is a second form of the weight for
    products of few rows, made by ``arrange_weights``.
    """

    replaces = "Linear"
    arranged: Arranged | None = None

    def __init__(self, in_features, out_features, bias, quant_type, double_quant, dtype, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.double_quant = quant_type, double_quant
        packed = empty_packed((out_features, in_features), double_quant, device)
        for name, tensor in zip(PACKED_BUFFERS, packed, strict=True):
            if tensor is not None:
                self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None

    @property
    def packed(self) -> Packed:
        """The stored tensors as the tuple that ``quant.nf4`` works on."""
        return Packed(*(getattr(self, name, None) for name in PACKED_BUFFERS))

    def set_packed(self, packed: Packed) -> None:
        """Take over packed tensors of this layer's shape, without a copy."""
        self.arranged = None
        for name, value in zip(PACKED_BUFFERS, packed, strict=True):
            if value is not None:
                setattr(self, name, value)

    @classmethod
    def from_weight(cls, weight, bias, quant_type, double_quant):
        """Quantise a weight [out, in]; ``bias`` [out] or None is kept as it is."""
        packed = quantize(weight, quant_type, double_quant)
        return cls.from_packed(packed, tuple(weight.shape), bias, quant_type, weight.dtype)

    @classmethod
    def from_packed(cls, packed, shape, bias, quant_type, dtype):
        """Build the layer around tensors that are packed already."""
        out_features, in_features = shape
        double_quant = packed.absmax_code is not None
        layer = cls(in_features, out_features, False, quant_type, double_quant, dtype, device="meta")
        layer.set_packed(packed)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = product_of_few(self, x)
        if y is not None:
            return y
        spec, tensors = frozen_weight(self)
        return FrozenMatmul.apply(x, None, self.bias, spec, *tensors)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.double_quant else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quant_type}{double}"


class WeightRows:
    """The rows of a layer's packed weight, unpacked as they are asked for: ``rows[slice or numbers]``."""

    def __init__(self, layer: QuantLinear, dtype: torch.dtype):
        self.shape = (layer.out_features, layer.in_features)
        self._packed, self._quant_type, self._dtype = layer.packed, layer.quant_type, dtype

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return dequantize_rows(self._packed, self.shape, rows, self._dtype, self._quant_type)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' ``Conv1D``: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def stands_for_conv1d(module: nn.Module) -> bool:
    """Tell whether a layer's weight is stored [in, out] in files: a ``Conv1D``, or the 4-bit one in its place."""
    return is_conv1d(module) or getattr(module, "replaces", "") == "Conv1D"


def frozen_weight(module: nn.Module) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
    """Describe the weight of a ``QuantLinear``, an ``nn.Linear`` or a ``Conv1D`` as spec and tensors."""
    if isinstance(module, QuantLinear):
        tensors = tuple(tensor for tensor in module.packed if tensor is not None)
        return WeightSpec((module.out_features, module.in_features), module.quant_type), tensors
    shape = tuple(module.weight.shape)
    if is_conv1d(module):
        return WeightSpec(shape[::-1], None, transposed=True), (module.weight,)
    return WeightSpec(shape, None), (module.weight,)


def arrange_weights(model: nn.Module) -> int:
    """Give the 4-bit layers of a model in host memory what their fused products of few rows need.

    Where the processor has no such kernel, or the memory is not there, layers go on unpacking their weights.

    Returns:
        Bytes that it took.
    """
    if model.dtype != torch.bfloat16:  # the kernel would round all inputs to it
        return 0
    layers = [module for module in model.modules() if isinstance(module, QuantLinear) and module.arranged is None]
    layers = [layer for layer in layers if can_arrange((layer.out_features, layer.in_features), layer.weight.device)]
    taken = sum(arranged_bytes((layer.out_features, layer.in_features)) for layer in layers)
    if taken > (1 - SPARED) * free_bytes(torch.device("cpu")):
        return 0
    for layer in layers:
        layer.arranged = arrange(layer.packed, (layer.out_features, layer.in_features), layer.quant_type)
    return taken


def product_of_few(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Return ``x @ weight.T + bias`` by the packed weight itself, or None where that does not serve.

    It serves where a 4-bit layer is used, not trained, with few rows. The product is rounded before anything is added
    to it, as in a merged 16-bit model.
    """
    if torch.is_grad_enabled() or module.training or not isinstance(module, QuantLinear) or not few(x):
        return None
    shape = module.out_features, module.in_features
    if module.arranged is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        y = cpu_product(x, module.arranged, shape)
    elif x.is_cuda and module.in_features % BLOCK_SIZE == 0:
        y = card_product(x, module.packed, shape, module.quant_type)
    else:
        return None
    return y if module.bias is None else y.add_(module.bias)
