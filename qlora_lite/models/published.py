"""Read safetensors whose weights are published packed, and train on their codes as they are.

``config.json`` says how (``quantization_config``), so that a plan knows each layer's format before anything is
downloaded. What the parts of a weight are called in files stands here, what they mean in ``quant.formats``. Parts are
read where they lie, as memory-mapped slices, and never rewritten.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import PACKED, placeholder, projections
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.linear import frozen_weight
from qlora_lite.quant.tensor_file import DTYPES

from .gguf_codes import Formats
from .locate import ModelFiles
from .nested import LanguagePart, without_weights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Published:
    """How a method of quantisation is found in files.

    Args:
        format_of: returns the name of the format of layers from what ``quantization_config`` says.
        parts: what each part of the format is called behind the path of a weight; of experts, of its parameter.
        experts: fused experts are packed, and linear layers are not.
        unused: what else files have of a weight, and is not needed.
    """

    format_of: Callable[[Mapping[str, Any]], str]
    parts: Mapping[str, str]
    experts: bool = False
    unused: Sequence[str] = ()


def _fp8(said: Mapping[str, Any]) -> str:
    sides, scales = said.get("weight_block_size") or ["a whole weight"], said.get("scale_fmt", "float")
    return f"fp8_{'x'.join(map(str, sides))}{'' if scales == 'float' else f' with scales in {scales}'}"


def _groups(said: Mapping[str, Any]) -> str:
    size, form = said.get("group_size"), said.get("checkpoint_format", "gptq")
    return f"{form}_{said.get('bits')}_{'row' if size == -1 else size}"


def _awq(said: Mapping[str, Any]) -> str:
    layout = said.get("version", "gemm")
    return f"awq_{said.get('bits')}_{said.get('group_size')}{'' if layout == 'gemm' else f' for {layout}'}"


_OF_GROUPS = {"weight": ".qweight", "zeros": ".qzeros", "scales": ".scales"}
METHODS: Mapping[str, Published] = {
    "mxfp4": Published(lambda said: "mxfp4", {"weight": "_blocks", "scales": "_scales"}, experts=True),
    "bitsandbytes": Published(lambda said: "int8", {"weight": ".weight", "scales": ".SCB"}, unused=(".weight_format",)),
    "fp8": Published(_fp8, {"weight": ".weight", "scales": ".weight_scale_inv"}, unused=(".activation_scale",)),
    "gptq": Published(_groups, _OF_GROUPS | {"group": ".g_idx"}),
    "awq": Published(_awq, _OF_GROUPS),
}


def is_published(said: Mapping[str, Any]) -> bool:
    """Return whether what a ``quantization_config`` says is a method whose codes are kept here.

    bitsandbytes' 4 bits are not: they are the NF4 and FP4 of this package (``quant.nf4``).
    """
    method, in_8_bit = said.get("quant_method"), said.get("load_in_8bit", said.get("_load_in_8bit"))
    return method in METHODS and (method != "bitsandbytes" or bool(in_8_bit))


def published_formats(config) -> Formats:
    """Return the formats of a model's packed weights by path; nothing for one that is not published in a known form.

    Args:
        config: transformers configuration of the language model.

    Raises:
        ModelError: the method is known, and not what it says of block sizes; or experts are packed one by one.
    """
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or not is_published(said):
        return ()
    method = METHODS[said["quant_method"]]
    skeleton, kind = without_weights(config), method.format_of(said)
    if kind not in FORMATS:
        raise ModelError(f"the model is quantised with {said['quant_method']} as {kind}, which is not known here; use "
                         "the 16-bit model instead")  # fmt: skip
    experts = {f"{each.path}.{each.name}": each for each in projections(skeleton)}
    if method.experts:
        return tuple((path, kind) for path in experts)
    if experts:
        raise ModelError(f"the model's experts are quantised with {said['quant_method']} one by one, which is not "
                         "known here; use the 16-bit model instead")  # fmt: skip
    skipped = said.get("modules_to_not_convert") or said.get("llm_int8_skip_modules") or []
    return tuple((path, kind) for path in linear_layers(skeleton) if not _is_skipped(path, skipped))


def _is_skipped(path: str, skipped: Iterable[str]) -> bool:
    """Return whether a list of paths, or of parts of paths, of layers in 16 bit names a layer."""
    return any(f".{name}." in f".{path}." or fnmatch(path, name) for name in skipped)


def published_state(files: ModelFiles, part: LanguagePart, formats: Formats, stack: ExitStack) -> dict[str, Any]:
    """Return what transformers' loader takes for a model's tensors, packed parts under the names of their modules.

    Args:
        stack: closes the files.

    Raises:
        ModelError: a part is missing, or has another type or shape than the format's.
    """
    if part.whole is not None:
        raise ModelError(f"{files.name} holds its language model among other parts, which is not read packed; use the "
                         "16-bit model instead")  # fmt: skip
    method = METHODS[part.config.quantization_config["quant_method"]]
    state, where = {}, {}
    for path in files.weights:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 - not a dict
                state[name], where[name] = file.get_slice(name), path
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}") from None
    shapes = _shapes(without_weights(part.config), method)
    for path, kind in formats:
        module = _module(path, method)
        for name, wanted in FORMATS[kind].parts(shapes[path]).items():
            stored = f"{path}{method.parts[name]}"
            if stored not in state:
                raise ModelError(f"{files.name}: no file has the tensor {stored}")
            found = state.pop(stored)
            is_of = DTYPES.get(found.get_dtype()), tuple(found.get_shape())
            is_exact = is_of[0] in _FLOATS and wanted[0] == torch.float32  # of scales, which are read so
            if is_of[1] != wanted[1] or not (is_of[0] == wanted[0] or is_exact):
                raise ModelError(f"{where[stored]}: the tensor {stored} is {_said(*is_of)}, and {_said(*wanted)} is "
                                 "needed")  # fmt: skip
            state[f"{module}.{name}"] = found
        for name in method.unused:
            state.pop(f"{path}{name}", None)
        if method.experts:
            state[path] = placeholder()
    packed = {f"{_module(path, method)}.{name}" for path, kind in formats for name in method.parts}
    for name in state.keys() - packed:
        if name in where and DTYPES.get(state[name].get_dtype()) not in _FLOATS:
            raise ModelError(f"{where[name]}: the tensor {name} is packed, and what quantization_config says of the "
                             "model's layers does not say so")  # fmt: skip
    return state


def _module(path: str, method: Published) -> str:
    """Return the path of the module that holds a weight's parts."""
    outer, _, name = path.rpartition(".")
    return f"{outer}.{PACKED}{name}" if method.experts else path


def _shapes(skeleton: nn.Module, method: Published) -> dict[str, tuple[int, ...]]:
    if method.experts:
        return {f"{each.path}.{each.name}": each.described[0].shape for each in projections(skeleton)}
    return {path: frozen_weight(layer)[0].shape for path, layer in linear_layers(skeleton).items()}


def _said(dtype: torch.dtype | None, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
