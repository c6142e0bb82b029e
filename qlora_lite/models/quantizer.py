"""Quantise each weight as it arrives, inside transformers' own loader.

transformers applies renames, fused layouts, tied weights and dtype rules while it streams a checkpoint. A
quantizer registered through its documented interface sees each final weight once, so all of that holds here
too and at most one 16-bit weight is alive at a time. (A loader of our own would have to repeat these rules;
bitsandbytes' quantizer makes several float32 copies of each weight and is much slower on a CPU.)

A model that the host's memory has no room for is put into files that the process sees as memory: the operating system
writes them to the disk and keeps of them in memory what it has room for.
"""

from collections.abc import Collection, Mapping, Sequence
from math import prod

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

from qlora_lite.adapters.lora.start import First, Start
from qlora_lite.adapters.parts import head_paths
from qlora_lite.errors import ModelError, OutputError
from qlora_lite.experts.packing import Projection, drop_parameter, pack_in_place, placeholder, projections, put_empty
from qlora_lite.offload.offload import disk_memory
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import QuantLinear, frozen_weight, is_conv1d, is_linear_16_bit, untouched
from qlora_lite.quant.nf4 import BLOCK_SIZE, Packed, quantize
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.units import format_bytes

from .kept import kept_layers
from .progress import Progress

METHOD = "qlora_lite"
PART_BYTES = 1 << 28  # of a file: a process may have few open at one time
ALIGNMENT = 64  # bytes, of a tensor in a file: what any type, and a processor's vectors, are content with
CAST_TO_HEAD = ("mamba", "mamba2", "falcon_mamba", "xlstm", "hy_v4", "hy_v4_vl")  # their forward, in transformers 5.24
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class QuantizeConfig(QuantizationConfigMixin):
    """Ask ``from_pretrained`` to quantise the linear layers and the experts of the blocks on arrival.

    Args:
        folder: what comes of it is put into files there (``InFiles``); None leaves it in memory.
        formats: of layers that arrive packed, by path, in ``quant.formats``; the others stay as they are then.
        keep_16bit: see ``kept.kept_layers``.
        start: how weights are split between the base and LoRA weights; None leaves them whole.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        folder: str | None = None,
        formats: Mapping[str, str] | None = None,
        keep_16bit: Sequence[str] = (),
        start: Start | None = None,
        **_unused,
    ):
        self.quant_method = METHOD
        self.quant_type, self.double_quant, self.folder = quant_type, double_quant, folder
        self.formats, self.keep_16bit, self.start = formats, list(keep_16bit), start


class InFiles:
    """Tensors in files without a name, which are gone when nobody holds the tensors, or the process ends.

    Args:
        folder: where the files are; it is there.
    """

    def __init__(self, folder: str):
        self._folder, self._room = folder, torch.empty(0, dtype=torch.uint8)
        self.is_full = False  # the disk, after which nothing else is put there

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of any values that lies in a file.

        Raises:
            OutputError: the disk has no room.
        """
        size = prod(shape) * dtype.itemsize
        with_gap = -(-size // ALIGNMENT) * ALIGNMENT
        if with_gap > len(self._room):
            self.is_full = True
            self._room = disk_memory(max(with_gap, PART_BYTES), self._folder, torch.device("cpu"), "QLORA_LITE_CACHE")
            self.is_full = False
        here, self._room = self._room[:size], self._room[with_gap:]
        return here.view(dtype).view(tuple(shape))

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor, without gaps, that lies in a file.

        Raises:
            OutputError: the disk has no room.
        """
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


class Splitter:
    """Pack weights, those of some layers without what their LoRA weights begin as, which is then in ``first``.

    Args:
        start: None packs all as they are.
        model: that they are of; a skeleton is enough.
    """

    def __init__(self, quant_type: str, double_quant: bool, start: Start | None = None, model: nn.Module | None = None):
        self._quant, self._start = (quant_type, double_quant), start
        self.first: First = {}
        self._ranks = start.ranks(model) if start and model else {}
        self._progress: Progress | None = None

    def pack(self, path: str, weight: torch.Tensor) -> Packed:
        """Pack the weight of a path.

        Raises:
            ModelError: see ``quantize``.
        """
        if self._start is None or path not in self._ranks:
            return quantize(weight, *self._quant)
        self._progress = self._progress or Progress("splitting weights", len(self._ranks))
        lora_a, lora_b, packed = self._start.split(weight, *self._ranks[path], *self._quant)
        self.first[path] = lora_a.cpu(), lora_b.cpu()
        self._progress.step()
        return packed


class QuantizeOnArrival(ConversionOps):
    """Replace one checkpoint weight by its packed tensors.

    A weight that cannot be quantised is left out, and the reason noted in ``problems``: of an exception raised
    here, transformers would print the stack trace and pass on only that there was one.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        layers: dict[str, PackedWeight],
        transposed: set[str],
        experts: dict[str, Projection],
        problems: list,
        files: InFiles | None = None,
        kept: dict[str, torch.dtype] | None = None,
        splitter: "Splitter | None" = None,
    ):
        self.config, self.layers, self.transposed = config, layers, transposed
        self.experts, self.problems = experts, problems
        self.files, self.kept = files, kept or {}
        self.splitter = splitter or Splitter(config.quant_type, config.double_quant)

    def convert(self, input_dict, **_unused):
        if self.config.formats is not None:
            return input_dict  # a placeholder: all that is packed goes where it belongs
        result = {}
        for name, value in input_dict.items():
            if self.files is not None and self.files.is_full:
                continue
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            if self.files is not None and (dtype := self.kept.get(name)):
                try:
                    result[name] = self.files.put(weight.to(dtype))
                except OutputError as error:
                    self.problems.insert(0, f"{name}: {error}")
                continue
            if path in self.transposed:
                weight = weight.t().contiguous()
            if projection := self.experts.get(name):
                path = projection.packed
                weight = projection.straight(weight)
                result[name] = placeholder()
            shape = self.layers[path].shape
            if tuple(weight.shape) != shape:
                self.problems.append(f"{name}: has the shape {tuple(weight.shape)}, and {shape} is needed")
                continue
            try:
                packed = self.splitter.pack(path, weight)
                if self.files:
                    packed = Packed(*(part if part is None else self.files.put(part) for part in packed))
            except OutputError as error:
                self.problems.insert(0, f"{name}: {error}")
                continue
            except ModelError as error:
                self.problems.append(f"{name}: {error}")
                continue
            stored = [tensor for tensor in packed if tensor is not None]
            for (buffer, _), tensor in zip(self.layers[path].named_buffers(recurse=False), stored, strict=True):
                result[f"{path}.{buffer}"] = tensor
        return result


class CutByShape(ConversionOps):
    """Cut a stored weight into those of several layers, along the first dimension.

    transformers' own ``Split`` asks the model's parameters for their sizes, and a packed weight is none.

    Args:
        layers: the packed ones, by path.
    """

    def __init__(self, layers: Mapping[str, PackedWeight]):
        self.layers = layers

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **_unused):
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        names = [full_layer_name.replace(target_patterns[0], target) for target in target_patterns]
        layers = [self.layers.get(name.removesuffix(".weight")) for name in names]
        sizes = [
            layer.shape[0] if layer else len(model.get_parameter(name))
            for layer, name in zip(layers, names, strict=True)
        ]
        parts = weight.split(sizes)
        return {target: part.contiguous() for target, part in zip(target_patterns, parts, strict=True)}


class OnArrivalQuantizer(HfQuantizer):
    """Put packed weights into the skeleton and fill them while the checkpoint is read, which may have them packed."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **_unused):
        skip = {*self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules), *head_paths(model)}
        config = self.quantization_config
        self.problems: list[str] = []
        self.splitter = Splitter(config.quant_type, config.double_quant, config.start, model)
        self.files = config.folder and InFiles(config.folder)
        self.kept: dict[str, torch.dtype] = {}
        kept = kept_layers(model, config.keep_16bit)
        self.experts = {each.parameter_path: each for each in projections(model) if each.parameter_path not in kept}
        if config.formats is not None:
            known = {*self.experts, *skip}  # those of other formats are in 16 bit in their files
            self.experts = {name: each for name, each in self.experts.items() if name in config.formats}
            for name, projection in self.experts.items():
                put_empty(projection, config.formats[name], config.double_quant)
            _replace_linears(model, config.quant_type, config.double_quant, known, self.experts, config.formats)
            self.layers, self.transposed = {}, set()
            return
        for projection in self.experts.values():
            put_empty(projection, config.quant_type, config.double_quant)
        # by name, those that go into files as they are
        weights = dict(model.named_parameters()) if self.files else {}
        self.kept = {name: model.dtype for path in kept for name in (path, f"{path}.weight") if name in weights}
        skip = {*skip, *kept}
        self.transposed = _replace_linears(model, config.quant_type, config.double_quant, skip, self.experts)
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
        for layer in self.layers.values():
            # transformers 5.17 gives a checkpoint's weight the type of what stands here, before it is quantised
            layer.weight = layer.weight.to(model.dtype)

    def update_weight_conversions(self, weight_conversions, model):
        for converter in weight_conversions:  # made for this load
            if operations := getattr(converter, "operations", ()):
                converter.operations = [
                    CutByShape(self.layers) if type(each).__name__ == "Split" and each.dim == 0 else each
                    for each in operations
                ]
        return super().update_weight_conversions(weight_conversions, model)

    def param_needs_quantization(self, model, param_name, **_unused):
        path, _, name = param_name.rpartition(".")
        if self.quantization_config.formats is not None:
            return param_name in self.experts
        is_packed = name == "weight" and isinstance(model.get_submodule(path), QuantLinear)
        return is_packed or param_name in self.experts or param_name in self.kept

    def param_element_size(self, model, param_name, param):
        # what transformers reserves on a GPU before it loads, and keeps; codes stand here, in the model's type
        if param_name in self.experts:  # what stands for it is asked for too
            return 0
        path, _, name = param_name.rpartition(".")
        return 1 if name == "weight" and path in self.layers else param.element_size()

    def get_quantize_ops(self):
        return QuantizeOnArrival(
            self.quantization_config,
            self.layers,
            self.transposed,
            self.experts,
            self.problems,
            self.files,
            self.kept,
            self.splitter,
        )

    def _process_model_after_weight_loading(self, model, **_unused):
        for projection in self.experts.values():
            drop_parameter(projection)

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return True


def replace_weights(
    model: nn.Module,
    quant_type: str,
    double_quant: bool,
    kept: Collection[str] = (),
    formats: Mapping[str, str] | None = None,
) -> None:
    """Put empty packed weights on the meta device in place of a skeleton's experts and linear layers but for its head.

    Args:
        kept: paths of those that stay in 16 bit.
        formats: see ``QuantizeConfig``.

    Raises:
        ModelError: other weights of the blocks would stay in 16 bit.
    """
    for projection in [each for each in projections(model) if each.parameter_path not in kept]:
        kind = quant_type if formats is None else formats.get(projection.parameter_path)
        if kind is not None:
            put_empty(projection, kind, double_quant)
            drop_parameter(projection)
    head = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    head |= head_paths(model)
    _replace_linears(model, quant_type, double_quant, head.union(kept), formats=formats)


def _replace_linears(
    model: nn.Module,
    quant_type: str,
    double_quant: bool,
    skip: set[str],
    experts: Collection[str] = (),
    formats: Mapping[str, str] | None = None,
) -> set[str]:
    """Put empty ``QuantLinear`` layers on the meta device in place of a skeleton's linear layers.

    Args:
        skip: paths, or last parts of paths, of layers, and paths of weights of experts, that stay as they are.
        experts: paths of weights of experts for which there is a packed weight.

    Returns:
        The paths of the layers whose weight is stored [in, out] in checkpoints (``Conv1D``).
    """
    _refuse_16_bit(model, {*experts, *skip})
    transposed, skip = set(), {*skip, *untouched(model)}
    for name, module in list(model.named_modules()):
        if name in skip or name.rpartition(".")[2] in skip:
            continue
        if not is_linear_16_bit(module) or (formats is not None and name not in formats):
            continue
        if is_conv1d(module):
            transposed.add(name)
        out_features, in_features = frozen_weight(module)[0].shape
        dtype = module.weight.dtype
        with torch.device("meta"):
            kind = quant_type if formats is None else formats[name]
            layer = QuantLinear(in_features, out_features, module.bias is not None, kind, double_quant, dtype)
        layer.replaces = type(module).__name__
        model.set_submodule(name, layer)
    return transposed


def _refuse_16_bit(model: nn.Module, known: Collection[str] = ()) -> None:
    """Raise if the blocks hold weights that are neither linear layers nor small; convolutions stay in 16 bit, and so do
    a vision encoder's tables of positions, [1, P, D] or of rows and columns [2, P, D].

    Args:
        known: paths of parameters for which there is a packed weight, or that are to stay in 16 bit.

    Raises:
        ModelError: naming the modules and the bytes that 4-bit loading would silently leave in 16 bit.
    """
    stacked = [
        (f"{path}.{leaf}", p)
        for path, module in model.named_modules()
        if not isinstance(module, CONVOLUTIONS)
        for leaf, p in module.named_parameters(recurse=False)
        if p.ndim >= 3 and len(p) > 1 and "position" not in leaf and p.numel() > 2**16 and f"{path}.{leaf}" not in known
    ]
    if stacked:
        size = format_bytes(sum(p.numel() * 2 for _, p in stacked))
        raise ModelError(
            f"{len(stacked)} weights hold several experts in one tensor, such as {stacked[0][0]} "
            f"{tuple(stacked[0][1].shape)}, in a form that is not known here; 4-bit loading would leave {size} of them "
            "in 16 bit. Set model.quant to none if that fits, or choose another model"
        )


def quantize_in_place(
    model: nn.Module, quant_type: str, double_quant: bool, keep_16bit: Sequence[str] = (), start: Start | None = None
) -> First:
    """Quantise the linear layers and experts of a model that is in memory already, one at a time.

    The head, ``untouched`` layers and what ``kept.kept_layers`` says stay as they are.

    Args:
        start: see ``QuantizeConfig``.

    Returns:
        What the LoRA weights begin as.
    """
    splitter, kept = Splitter(quant_type, double_quant, start, model), kept_layers(model, keep_16bit)
    pack_in_place(model, quant_type, double_quant, kept)
    _refuse_16_bit(model, kept)
    head, skip = model.get_output_embeddings(), untouched(model) | kept | head_paths(model)
    for name, module in list(model.named_modules()):
        if module is head or name in skip or not is_linear_16_bit(module):
            continue
        weight = module.weight.detach().t().contiguous() if is_conv1d(module) else module.weight.detach()
        packed = splitter.pack(name, weight)
        layer = QuantLinear.from_packed(packed, tuple(weight.shape), module.bias, quant_type, weight.dtype)
        layer.replaces = type(module).__name__
        model.set_submodule(name, layer)
    return splitter.first


def quantize_head(model: nn.Module, quant: str, double_quant: bool) -> None:
    """Give the model a 4-bit copy of its head; embeddings that were the head stay as they are.

    Args:
        quant: how the blocks are stored; beside what is no format to quantise to ("none", "keep") the head is NF4.

    Raises:
        ModelError: a row of the head is not made of whole blocks, or the model cannot use a packed head.
    """
    if model.config.model_type in CAST_TO_HEAD:
        raise ModelError(
            f"a {model.config.model_type} model rounds what its head reads to the type of the stored "
            "weight, which 4-bit codes are not: set model.quant_head to false"
        )
    head, quant_type = model.get_output_embeddings(), quant if quant in FOUR_BIT else "nf4"
    if head.weight.shape[1] % BLOCK_SIZE:
        raise ModelError(
            f"a head with rows of {head.weight.shape[1]} weights cannot be read row by row in 4 bit: set "
            "model.quant_head to false"
        )
    if head.weight.is_meta:
        out_features, in_features = head.weight.shape
        layer = QuantLinear(
            in_features, out_features, head.bias is not None, quant_type, double_quant, head.weight.dtype, device="meta"
        )
    else:
        layer = QuantLinear.from_weight(head.weight.detach(), head.bias, quant_type, double_quant)
    model.set_output_embeddings(layer)


def register() -> None:
    """Make the quantizer known to transformers; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QuantizeConfig)
        register_quantizer(METHOD)(OnArrivalQuantizer)
