"""Products with a frozen weight, 4-bit or not, behind one small interface.

A weight is described by a ``WeightSpec`` and a flat tuple of plain tensors. Everything that multiplies by a frozen
weight takes this pair, so that 4-bit layers, 16-bit layers and GPT-2's transposed ``Conv1D`` share one code path, and
so that autograd keeps the *packed* tensors through ``save_for_backward`` (tensors kept on ``ctx`` instead go stale
silently when weights are streamed: bitsandbytes issues 2034 and 2035). Nothing dequantised outlives the operation that
needed it, unless ``keeping_weights`` says that it will be needed again at once.

Shapes: x [..., in], weight [out, in], y [..., out]; T is the product of x's leading dimensions.
Source: QLoRA, arXiv 2305.14314, section 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

from .formats import FORMATS
from .merging import NF4, Merging, merged_blocks, merged_codes
from .nf4 import Packed


class WeightSpec(NamedTuple):
    """How a tuple of tensors becomes a weight [out, in].

    ``quant_type`` is the name of a format of ``quant.formats``; None means that the tuple holds the weight itself,
    stored [in, out] if ``transposed``. With ``merging`` the tuple ends with LoRA weights A and B, which are merged into
    that weight as it says.
    """

    shape: tuple[int, ...]
    quant_type: str | None
    transposed: bool = False
    merging: Merging | None = None


class KeptWeights:
    """Dequantised weights that are going to be multiplied by again.

    Args:
        stay: they serve any number of products, as those of other tiles; else each goes with the gradient it is for.
    """

    def __init__(self, stay: bool):
        self.stay = stay
        self._weights: dict[tuple, torch.Tensor] = {}

    def weight(self, spec: WeightSpec, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype, again: bool):
        """Return a weight, dequantised or found, and keep it if it is needed ``again``."""
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
    """Let the products inside keep their dequantised weights for their gradients, which may be computed outside.

    Args:
        stay: see ``KeptWeights``.
    """
    token = _kept.set(KeptWeights(stay))
    try:
        yield
    finally:
        _kept.reset(token)


@contextmanager
def float32_partial_sums() -> Iterator[None]:
    """Keep cuBLAS from adding the parts of a long sum in 16 bits, and restore torch's setting at the end.

    Where a product has few rows and columns and long sums, cuBLAS cuts the sums into parts to keep all of a GPU busy
    (split K), and torch lets it store the parts in the type of the result. The gradients of LoRA weights are such
    products: r columns, sums over all tokens of a micro-batch. Of 4,096 tokens in 16 parts, bfloat16 parts triple a
    gradient's relative error (0.17 to 0.53 %, emulated against float64). The products with frozen weights are large
    enough that none of their sums is cut, so that this costs them nothing.
    """
    settings, before = torch.backends.cuda.matmul, {}
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        before[name] = getattr(settings, name), getattr(settings, f"{name}_split_k")
        setattr(settings, name, (False, before[name][1]))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def kept_for(x: torch.Tensor) -> KeptWeights | None:
    """Return where a product with x and its gradient find its dequantised weight; None where it would serve no
    other."""
    kept = None if torch.compiler.is_compiling() else _kept.get()  # torch.compile cannot trace a context variable
    return kept if kept is not None and (kept.stay or x.requires_grad) else None


def materialize(
    spec: WeightSpec,
    tensors: tuple[torch.Tensor, ...],
    dtype: torch.dtype,
    kept: KeptWeights | None = None,
    again: bool = False,
) -> torch.Tensor:
    """Return the weight [out, in] in ``dtype``; a view of the stored tensor where that is possible.

    Args:
        kept: from ``kept_for``.
        again: it will be needed once more.
    """
    if kept is not None and (spec.quant_type or spec.merging):
        return kept.weight(spec, tensors, dtype, again)
    if spec.merging is not None:
        spec, tensors = merged(spec, tensors)
    if spec.quant_type is not None:
        return FORMATS[spec.quant_type].dequantize(tensors, spec.shape, dtype)
    weight = tensors[0].to(dtype)
    return weight.t() if spec.transposed else weight


def merged(spec: WeightSpec, tensors: tuple[torch.Tensor, ...]) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
    """Return a weight with ``merging`` in the format that it is merged into, without the LoRA weights."""
    merging, (*frozen, lora_a, lora_b) = spec.merging, tensors
    assert merging is not None
    if merging.to == NF4:
        codes = merged_codes(merging, Packed(*frozen), lora_a, lora_b)
        return spec._replace(merging=None), tuple(part for part in codes if part is not None)
    made_in = frozen[0].dtype if spec.quant_type is None else torch.float32
    weight = materialize(spec._replace(merging=None), tuple(frozen), made_in)
    return WeightSpec(spec.shape, merging.to), (merged_blocks(merging, weight, lora_a, lora_b),)


def product(
    x: torch.Tensor,
    spec: WeightSpec,
    tensors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    kept: KeptWeights | None = None,
    again: bool = False,
    of_gradient: bool = False,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        kept, again: see ``materialize``.
        of_gradient: x is the gradient [..., out] of such a product; return ``x @ weight`` [..., in].
    """
    if torch.compiler.is_compiling():
        y = _operator(x.reshape(-1, x.shape[-1]), list(tensors), *_described(spec), of_gradient)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias
    weight = materialize(spec, tensors, x.dtype, kept, again)
    return x @ weight if of_gradient else nn.functional.linear(x, weight, bias)


def add_product(
    addend: torch.Tensor,
    x: torch.Tensor,
    spec: WeightSpec,
    tensors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    kept: KeptWeights | None = None,
    again: bool = False,
    of_gradient: bool = False,
) -> torch.Tensor:
    """Add ``product`` of the other arguments to ``addend`` in place, and return it.

    The sum is rounded once, at the end of the product (but not under torch.compile; see ``product_beside``). Rounding
    the product first would swallow an addend below half a step of bf16 whole: the fate of a LoRA update in its first
    steps (``tests/adapters/test_small_updates.py``). (On a GPU this holds under ``float32_partial_sums``.)
    """
    if torch.compiler.is_compiling():
        return addend.add_(product(x, spec, tensors, bias, of_gradient=of_gradient))
    weight = materialize(spec, tensors, x.dtype, kept, again)
    rows = addend.view(-1, addend.shape[-1])
    rows.addmm_(x.reshape(-1, x.shape[-1]), weight if of_gradient else weight.t())
    return addend if bias is None else addend.add_(bias)


def product_beside(
    low: torch.Tensor,
    factor: torch.Tensor,
    x: torch.Tensor,
    spec: WeightSpec,
    tensors: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    kept: KeptWeights | None,
    again: bool,
    of_gradient: bool = False,
) -> torch.Tensor:
    """Return ``low @ factor.T`` and ``product`` of the other arguments, their sum rounded once.

    Args:
        low, factor: [T, r] and [out, r]; of a gradient [in, r].
        kept, again: see ``materialize``.
    """
    if not torch.compiler.is_compiling():
        y = nn.functional.linear(low.view(*x.shape[:-1], low.shape[-1]), factor)
        return add_product(y, x, spec, tensors, bias, kept, again, of_gradient)
    y = _operator(x.reshape(-1, x.shape[-1]), list(tensors), *_described(spec), of_gradient, low, factor)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def _described(spec: WeightSpec) -> tuple[list[int], str | None, bool]:
    return list(spec.shape), spec.quant_type, spec.transposed


@torch.library.custom_op("qlora_lite::product", mutates_args=())
def _operator(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    shape: list[int],
    quant_type: str | None,
    transposed: bool,
    of_gradient: bool,
    low: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply rows by a frozen weight as one operator, for torch.compile: what is dequantised is not its to keep.

    It gets nothing to add to in place: for a compiler that is another tensor, and a copy. Where weights are kept, the
    gradient is computed inside too, since it is part of the same graph (``offload.compiled.gradient_root``).
    """
    spec, kept, again = WeightSpec(tuple(shape), quant_type, transposed), _kept.get(), not of_gradient
    if low is not None and factor is not None:
        return product_beside(low, factor, x, spec, tuple(tensors), None, kept, again, of_gradient)
    return product(x, spec, tuple(tensors), None, kept, again, of_gradient)


@_operator.register_fake
def _(x, tensors, shape, quant_type, transposed, of_gradient, low=None, factor=None):
    return x.new_empty(x.shape[0], shape[of_gradient])


class FrozenMatmul(torch.autograd.Function):
    """Compute ``addend + x @ weight.T + bias`` for a weight that gets no gradient; backward rebuilds the weight. A bias
    [out] that is trained gets one."""

    @staticmethod
    def forward(ctx, x, addend, bias, spec, *tensors):
        ctx.spec, ctx.kept = spec, kept_for(x)
        ctx.save_for_backward(*tensors)
        if addend is None:
            return product(x, spec, tensors, bias, ctx.kept, again=True)
        return add_product(addend.clone(), x, spec, tensors, bias, ctx.kept, again=True)

    @staticmethod
    def backward(ctx, grad_y):
        tensors = ctx.saved_tensors  # read once: with checkpointing the second access is an error
        wants_x = ctx.needs_input_grad[0]
        grad_x = product(grad_y, ctx.spec, tensors, kept=ctx.kept, of_gradient=True) if wants_x else None
        grad_addend = grad_y if ctx.needs_input_grad[1] else None
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_addend, grad_bias, None, *(None for _ in tensors)
