"""Frozen linear layers whose weights are stored in 4 bits, and what describes any linear layer's weight.

``bitsandbytes.nn.Linear4bit`` is not used: it keeps the quantisation constants outside the module's
registers, rewrites its own weight during ``forward`` on CPUs, and trains slower there (``tools/bench/peers``
trains with it).

Shapes: x [..., in], weight [out, in], y [..., out].
Source: QLoRA, arXiv 2305.14314, section 3.
"""

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn

from qlora_lite.memory.meter import free_bytes

from .formats import FORMATS, FOUR_BIT
from .nf4 import BLOCK_SIZE, quantize
from .packed import PackedWeight
from .product import FrozenMatmul, WeightSpec, materialize
from .small_batch import (
    Arranged,
    arrange,
    arranged_bytes,
    can_arrange,
    cpu_product,
    few,
    gpu_product,
    kernel_takes_our_order,
)

log = logging.getLogger("qlora_lite")

_ROUTER = re.compile(r"(^|[._])(router|gate|wg)(\.|$)")
SPARED = 0.5  # of the free memory, that arranged weights leave to everything else
WEIGHTS_AT_ONCE = 1 << 22  # whose squares are summed, in float32


class QuantLinear(PackedWeight):
    """A frozen linear layer whose weight [out, in] is packed; ``bias`` [out], if any, is a frozen parameter.

    ``replaces`` is the name of the class that stood here before; ``arranged`` is a second form of the weight for
    products of few rows, made by ``arrange_weights``.
    """

    replaces = "Linear"
    arranged: Arranged | None = None

    def __init__(self, in_features, out_features, bias, quant_type, double_quant, dtype, device=None):
        super().__init__((out_features, in_features), quant_type, double_quant, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None

    def set_packed(self, packed: Sequence[torch.Tensor | None]) -> None:
        """Take over packed tensors of this layer's shape, without a copy."""
        self.arranged = None
        super().set_packed(packed)

    @classmethod
    def from_weight(cls, weight, bias, quant_type, double_quant):
        """Quantise a weight [out, in]; ``bias`` [out] or None is kept as it is."""
        packed = quantize(weight, quant_type, double_quant)
        return cls.from_packed(packed, tuple(weight.shape), bias, quant_type, weight.dtype)

    @classmethod
    def from_packed(cls, packed, shape, bias, quant_type, dtype):
        """Build the layer around tensors that are packed already: the parts of a format, in its order."""
        out_features, in_features = shape
        stored = [tensor for tensor in packed if tensor is not None]
        double_quant = len(stored) > len(FORMATS[quant_type].parts(shape))
        layer = cls(in_features, out_features, False, quant_type, double_quant, dtype, device="meta")
        layer.set_packed(packed)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = small_batch_product(self, x)
        if y is not None:
            return y
        spec, tensors = frozen_weight(self)
        return FrozenMatmul.apply(x, None, self.bias, spec, *tensors)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.double_quant else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quant_type}{double}"


class WeightRows:
    """The rows of a layer's packed weight, dequantised as they are asked for: ``rows[slice or numbers]``."""

    def __init__(self, layer: QuantLinear, dtype: torch.dtype):
        self.shape = (layer.out_features, layer.in_features)
        self._format, self._tensors, self._dtype = FORMATS[layer.quant_type], layer.described[1], dtype

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return self._format.dequantize_rows(self._tensors, self.shape, rows, self._dtype)


def untouched(model: nn.Module) -> set[str]:
    """Return the paths of linear layers that are neither packed nor adapted: routers, and those whose weight the module
    around them multiplies by itself, ``dt_proj`` of Mamba layers and ``out_proj`` of torch's attention."""
    attention = {
        f"{path}.out_proj" for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    return _routers(model) | of_mamba(model, "dt_proj") | attention


def of_mamba(model: nn.Module, *names: str) -> set[str]:
    """Return the paths of linear layers of some names in Mamba layers, which have a decay A and a direct path D."""
    mixers = [
        path
        for path, module in model.named_modules()
        if {"A_log", "D"} <= {name for name, _ in module.named_parameters(recurse=False)}
    ]
    return {f"{mixer}.{name}" for mixer in mixers for name in names}


def _routers(model: nn.Module) -> set[str]:
    """Return the paths of linear layers that choose among experts or weigh them.

    transformers has no mark for them but their names and sizes, beside experts of its common form.
    """
    found = set()
    for path, experts in model.named_modules():
        if hasattr(experts, "has_gate"):
            beside, sizes = path.rpartition(".")[0], (experts.num_experts, 1)
            layers = [(name, m) for name, m in model.get_submodule(beside).named_modules() if is_linear(m)]
            found |= {
                f"{beside}.{name}"
                for name, layer in layers
                if _ROUTER.search(name) and frozen_weight(layer)[0].shape[0] in sizes
            }
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' ``Conv1D``: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear_16_bit(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that is not in 4 bits.

    Some routers are subclasses of ``nn.Linear`` that give more than a product (Phi-MoE, Llama-4); Falcon's is one that
    does the same by other words.
    """
    is_product = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_product or type(module).__name__ == "FalconLinear" or is_conv1d(module)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose weight ``frozen_weight`` can describe."""
    return isinstance(module, QuantLinear) or is_linear_16_bit(module)


def stands_for_conv1d(module: nn.Module) -> bool:
    """Return whether a layer's weight is stored [in, out] in files: a ``Conv1D``, or the 4-bit one in its place."""
    return is_conv1d(module) or getattr(module, "replaces", "") == "Conv1D"


def frozen_weight(module: nn.Module) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
    """Describe the weight of a ``QuantLinear``, an ``nn.Linear`` or a ``Conv1D`` as spec and tensors."""
    if isinstance(module, QuantLinear):
        return module.described
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    shape = tuple(weight.shape)
    if is_conv1d(module):
        return WeightSpec(shape[::-1], None, transposed=True), (weight,)
    return WeightSpec(shape, None), (weight,)


def squared_row_norms(module: nn.Module) -> torch.Tensor:
    """Return the sum of the squares of each row of a linear layer's weight, float32 [out].

    A 4-bit weight is dequantised a few rows at a time, but for one whose rows are not made of whole blocks.
    """
    spec, tensors = frozen_weight(module)
    out_features, in_features = spec.shape
    squares = torch.empty(out_features, dtype=torch.float32, device=tensors[0].device)
    if squares.is_meta:
        return squares
    by_rows = isinstance(module, QuantLinear) and in_features % FORMATS[module.quant_type].block == 0
    dtype = torch.float32 if isinstance(module, QuantLinear) else tensors[0].dtype
    rows = WeightRows(module, dtype) if by_rows else materialize(spec, tensors, dtype)
    at_once = max(1, WEIGHTS_AT_ONCE // in_features)
    for start in range(0, out_features, at_once):
        some = slice(start, start + at_once)
        squares[some] = rows[some].float().square().sum(1)
    return squares


def arrange_weights(model: nn.Module) -> int:
    """Give the 4-bit layers of a model in host memory what their fused products of few rows need.

    Where the processor has no such kernel, or it wants another order, or the memory is not there, layers go on
    dequantising their weights.

    Returns:
        Bytes that it took.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:  # the kernel would round all inputs to it
        return 0
    layers = [module for module in model.modules() if isinstance(module, QuantLinear) and module.arranged is None]
    layers = [
        layer
        for layer in layers
        if layer.quant_type in FOUR_BIT and can_arrange((layer.out_features, layer.in_features), layer.weight.device)
    ]
    if layers and not kernel_takes_our_order():
        log.warning("generation dequantises weights for every token: this bitsandbytes orders them otherwise on a CPU")
        return 0
    taken = sum(arranged_bytes((layer.out_features, layer.in_features)) for layer in layers)
    if taken > (1 - SPARED) * free_bytes(torch.device("cpu")):
        return 0
    for layer in layers:
        arrange_layer(layer)
    return taken


def arrange_layer(layer: QuantLinear) -> None:
    """Give a layer its second form, if its format and shape have one; see ``arrange_weights``."""
    shape = layer.out_features, layer.in_features
    if layer.quant_type in FOUR_BIT and can_arrange(shape, layer.weight.device):
        layer.arranged = arrange(layer.packed, shape, layer.quant_type)


def small_batch_product(module: nn.Module, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor | None:
    """Return ``x @ weight.T + bias`` by the packed weight itself, or None where that does not serve.

    It serves where a 4-bit layer is used, not trained, with few rows. The product is rounded before anything is added
    to it, as in a merged 16-bit model.
    """
    if torch.is_grad_enabled() or module.training or not isinstance(module, QuantLinear) or not few(x):
        return None
    if module.quant_type not in FOUR_BIT:
        return None
    shape = module.out_features, module.in_features
    if module.arranged is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        y = cpu_product(x, module.arranged, shape)
    elif not x.is_cpu and module.in_features % BLOCK_SIZE == 0:
        y = gpu_product(x, module.packed, shape, module.quant_type)
    else:
        return None
    return y.add_(module.bias) if with_bias and module.bias is not None else y
