"""Quantise each weight as it arrives, inside transformers' own loader.

transformers applies renames, fused layouts, tied weights and dtype rules while it streams a checkpoint. A
quantizer registered through its documented interface sees each final weight once, so all of that holds here
too and at most one 16-bit weight is alive at a time. (A loader of our own would have to repeat these rules;
bitsandbytes' quantizer makes several float32 copies of each weight and is much slower on a CPU.)
"""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_lite.errors import ModelError
from qlora_lite.quant.linear import PACKED_BUFFERS, QuantLinear, frozen_weight, is_conv1d
from qlora_lite.quant.nf4 import BLOCK_SIZE, quantize
from qlora_lite.units import format_bytes

METHOD = "qlora_lite"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class QuantizeConfig(QuantizationConfigMixin):
    """Ask ``from_pretrained`` to quantise the linear layers of the blocks on arrival."""

    def __init__(self, quant_type: str = "nf4", double_quant: bool = True, **_unused):
        self.quant_method = METHOD
        self.quant_type, self.double_quant = quant_type, double_quant


class QuantizeOnArrival(ConversionOps):
    """Replace one checkpoint weight by its packed tensors.

    A weight that cannot be quantised is left out, and the reason noted in ``problems``: of an exception raised
    here, transformers would print the stack trace and pass on only that there was one.
    """

    def __init__(self, config: QuantizeConfig, layers: dict[str, QuantLinear], transposed: set[str], problems: list):
        self.config, self.layers, self.transposed, self.problems = config, layers, transposed, problems

    def convert(self, input_dict, **_unused):
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            if path in self.transposed:
                weight = weight.t().contiguous()
            shape = self.layers[path].out_features, self.layers[path].in_features
            if tuple(weight.shape) != shape:
                self.problems.append(f"{name}: has the shape {tuple(weight.shape)}, and {shape} is needed")
                continue
            try:
                packed = quantize(weight, self.config.quant_type, self.config.double_quant)
            except ModelError as error:
                self.problems.append(f"{name}: {error}")
                continue
            for buffer, tensor in zip(PACKED_BUFFERS, packed, strict=True):
                if tensor is not None:
                    result[f"{path}.{buffer}"] = tensor
        return result


class OnArrivalQuantizer(HfQuantizer):
    """Put ``QuantLinear`` layers into the skeleton and fill them while the checkpoint is read."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **_unused):
        skip = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        config = self.quantization_config
        self.problems: list[str] = []
        self.transposed = replace_linears(model, config.quant_type, config.double_quant, skip)
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        for layer in self.layers.values():
            # transformers 5.17 gives a checkpoint's weight the type of what stands here, before it is quantised
            layer.weight = layer.weight.to(model.dtype)

    def param_needs_quantization(self, model, param_name, **_unused):
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantLinear)

    def param_element_size(self, model, param_name, param):
        # what transformers reserves on a card before it loads, and keeps; codes stand here, in the model's type
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self):
        return QuantizeOnArrival(self.quantization_config, self.layers, self.transposed, self.problems)

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return True


def replace_linears(model: nn.Module, quant_type: str, double_quant: bool, skip=()) -> set[str]:
    """Put empty ``QuantLinear`` layers on the meta device in place of a skeleton's linear layers.

    Args:
        skip: paths, or last parts of paths, of layers that stay as they are (the head).

    Returns:
        The paths of the layers whose weight is stored [in, out] in checkpoints (``Conv1D``).

    Raises:
        ModelError: weights of the blocks would stay in 16 bit (experts held in one three-dimensional tensor).
    """
    refuse_unquantized_experts(model)
    transposed = set()
    for name, module in list(model.named_modules()):
        if name in skip or name.rpartition(".")[2] in skip:
            continue
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        if is_conv1d(module):
            transposed.add(name)
        out_features, in_features = frozen_weight(module)[0].shape
        dtype = module.weight.dtype
        with torch.device("meta"):
            layer = QuantLinear(in_features, out_features, module.bias is not None, quant_type, double_quant, dtype)
        layer.replaces = type(module).__name__
        model.set_submodule(name, layer)
    return transposed


def refuse_unquantized_experts(model: nn.Module) -> None:
    """Raise if the blocks hold weights that are neither linear layers nor small; convolutions stay in 16 bit.

    Raises:
        ModelError: naming the modules and the bytes that 4-bit loading would silently leave in 16 bit.
    """
    stacked = [
        (f"{path}.{leaf}", p) for path, module in model.named_modules() if not isinstance(module, CONVOLUTIONS)
        for leaf, p in module.named_parameters(recurse=False) if p.ndim >= 3 and p.numel() > 2**16
    ]  # fmt: skip
    if stacked:
        size = format_bytes(sum(p.numel() * 2 for _, p in stacked))
        raise ModelError(
            f"{len(stacked)} weights hold several experts in one tensor, such as {stacked[0][0]} "
            f"{tuple(stacked[0][1].shape)}; 4-bit loading would leave {size} of them in 16 bit. Such models are "
            "not supported yet; set model.quant to none if that fits, or choose a model without experts"
        )


def quantize_in_place(model: nn.Module, quant_type: str, double_quant: bool) -> None:
    """Quantise the linear layers of a model that is in memory already, one at a time; the head stays."""
    refuse_unquantized_experts(model)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if module is head or (not isinstance(module, nn.Linear) and not is_conv1d(module)):
            continue
        weight = module.weight.detach().t().contiguous() if is_conv1d(module) else module.weight.detach()
        layer = QuantLinear.from_weight(weight, module.bias, quant_type, double_quant)
        layer.replaces = type(module).__name__
        model.set_submodule(name, layer)


def quantize_head(model: nn.Module, quant: str, double_quant: bool) -> None:
    """Give the model a 4-bit copy of its head; embeddings that were the head stay as they are.

    Args:
        quant: how the blocks are stored; beside 16-bit ones ("none") the head is NF4.

    Raises:
        ModelError: a row of the head is not made of whole blocks.
    """
    head, quant_type = model.get_output_embeddings(), "nf4" if quant == "none" else quant
    if head.weight.shape[1] % BLOCK_SIZE:
        raise ModelError(f"a head with rows of {head.weight.shape[1]} weights cannot be read row by row in 4 bit: set "
                         "model.quant_head to false")  # fmt: skip
    if head.weight.is_meta:
        out_features, in_features = head.weight.shape
        layer = QuantLinear(in_features, out_features, head.bias is not None, quant_type, double_quant,
                            head.weight.dtype, device="meta")  # fmt: skip
    else:
        layer = QuantLinear.from_weight(head.weight.detach(), head.bias, quant_type, double_quant)
    model.set_output_embeddings(layer)


def register() -> None:
    """Make the quantizer known to transformers; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QuantizeConfig)
        register_quantizer(METHOD)(OnArrivalQuantizer)
