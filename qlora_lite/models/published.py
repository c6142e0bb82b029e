"""Read safetensors whose weights are published packed, and train on their codes as they are.

``config.json`` says how (``quantization_config``), so that a plan knows each layer's format before anything is
downloaded. What the parts of a weight are called in files stands here, what they mean in ``quant.formats``. Parts are
read where they lie, as memory-mapped slices, and never rewritten. Experts that files have one by one are the exception:
transformers computes with those of a block together, so that their codes are copied, as they are, into one tensor.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import Projection, placeholder, projections
from qlora_lite.quant.formats import FORMATS, Parts
from qlora_lite.quant.linear import frozen_weight
from qlora_lite.quant.tensor_file import DTYPES, Entries

from .gguf_codes import Formats
from .locate import ModelFiles
from .nested import LanguagePart, names_in_model, stacking_rules, without_weights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EXPERT = re.compile(r"(.+\.)\d+(\.[^.]+)")  # a layer of one: what is before and behind its number
_BLOCK = re.compile(r"(.+?)\.(\d+)\.")
Empty = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Read = Callable[[str], torch.Tensor]
log = logging.getLogger("qlora_lite")


@dataclass(frozen=True, slots=True)
class Published:
    """How a method of quantisation is found in files.

    Args:
        format_of: returns the name of the format of layers from what ``quantization_config`` says.
        parts: what each part of the format is called behind the path of a weight; of experts, of its parameter.
        experts: how files have them: "single", packed one by one as linear layers are; "fused", those of a block
            together, packed, and linear layers in 16 bit; "" is not known.
        unused: what else files have of a weight, and is not needed.
        rows: of a weight that share a constant, so that weights of so many, or a multiple, can be joined.
        known: which of its formats are read, in words; "" if all that there are.
    """

    format_of: Callable[[Mapping[str, Any]], str]
    parts: Mapping[str, str]
    experts: str = "single"
    unused: Sequence[str] = ()
    rows: int = 1
    known: str = ""


def _fp8(said: Mapping[str, Any]) -> str:
    sides, scales = said.get("weight_block_size") or [], said.get("scale_fmt", "float")
    sides = sides if isinstance(sides, list | tuple) else [sides]
    return f"fp8_{'x'.join(map(str, sides))}{'' if scales == 'float' else f' {scales}'}"


def _groups(said: Mapping[str, Any]) -> str:
    size, form = said.get("group_size"), said.get("checkpoint_format") or said.get("format") or "gptq"
    return f"{form}_{said.get('bits')}_{'row' if size == -1 else size}"


def _awq(said: Mapping[str, Any]) -> str:
    layout = str(said.get("version", "gemm")).lower()
    return f"awq_{said.get('bits')}_{said.get('group_size')}{'' if layout == 'gemm' else f' {layout}'}"


_SAYS = "bits", "group_size", "checkpoint_format", "format", "version", "weight_block_size", "scale_fmt"
_OF_GROUPS = {"weight": ".qweight", "zeros": ".qzeros", "scales": ".scales"}
METHODS: Mapping[str, Published] = {
    "mxfp4": Published(lambda said: "mxfp4", {"weight": "_blocks", "scales": "_scales"}, experts="fused"),
    "bitsandbytes": Published(
        lambda said: "int8", {"weight": ".weight", "scales": ".SCB"}, experts="", unused=(".weight_format",)
    ),
    "fp8": Published(
        _fp8,
        {"weight": ".weight", "scales": ".weight_scale_inv"},
        unused=(".activation_scale",),
        rows=128,
        known="blocks of 128 x 128 with a scale in float each",
    ),
    "gptq": Published(
        _groups,
        _OF_GROUPS | {"group": ".g_idx"},
        known="4 or 8 bits in groups of 32, 64, 128 or a row (-1), format gptq or gptq_v2",
    ),
    "awq": Published(_awq, _OF_GROUPS, known="4 bits in groups of 32, 64 or 128, version gemm"),
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
        ModelError: the method is known, and not what it says of block sizes; or experts are not of the common form.
    """
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or not is_published(said):
        return ()
    method = METHODS[said["quant_method"]]
    skeleton, kind = without_weights(config), method.format_of(said)
    if kind not in FORMATS:
        how = ", ".join(f"{key} {said[key]}" for key in _SAYS if key in said) or "no more is said"
        raise ModelError(
            f"the model is quantised with {said['quant_method']} ({how}), of which is read: "
            f"{method.known}; use the 16-bit model instead"
        )
    experts = {each.parameter_path: each for each in projections(skeleton)}
    if method.experts == "fused":
        return tuple((path, kind) for path in experts)
    skipped = said.get("modules_to_not_convert") or said.get("llm_int8_skip_modules") or []
    packed = [path for path in (*linear_layers(skeleton), *experts) if not _is_skipped(path, skipped)]
    single = [experts[path] for path in packed if path in experts]
    is_known = method.experts and not any(each.experts.is_transposed for each in single)
    if single and not (is_known and stacking_rules(skeleton)):
        raise ModelError(
            f"the model's experts are quantised with {said['quant_method']} in a form that is not known "
            "here; use the 16-bit model instead"
        )
    for each in single:
        rows = each.described[0].shape[1] // _joined(each)
        if _joined(each) > 1 and rows % method.rows:
            raise ModelError(
                f"the model's experts have {rows} inner features, and {kind} has a scale for "
                f"{method.rows}, so that two such weights cannot be joined; use the 16-bit model "
                "instead"
            )
    return tuple((path, kind) for path in packed)


def _joined(projection: Projection) -> int:
    """Return how many weights of an expert a projection joins: two, gate and up, or one."""
    return 2 if projection.experts.has_gate and projection.name != "down_proj" else 1


def stacked_bytes(config, formats: Formats) -> int:
    """Return the bytes of codes and constants of experts that files have one by one, and are put together.

    Args:
        formats: of the model's packed weights, see ``published_formats``.
    """
    said = getattr(config, "quantization_config", None) if formats else None
    if not said or METHODS[said["quant_method"]].experts != "single":
        return 0
    kinds, sizes = dict(formats), list[Parts]()
    for each in projections(without_weights(config)):
        if each.parameter_path in kinds:
            sizes.append(FORMATS[kinds[each.parameter_path]].parts(each.described[0].shape))
    return sum(prod(shape) * dtype.itemsize for parts in sizes for dtype, shape in parts.values())


def _is_skipped(path: str, skipped: Iterable[str]) -> bool:
    """Return whether a list of paths, or of parts of paths, of layers in 16 bit names a layer."""
    return any(f".{name}." in f".{path}." or fnmatch(path, name) for name in skipped)


class _Files:
    """The tensors of a model's files by name, as slices, which transformers' loader reads as it needs them.

    Raises:
        ModelError: a file cannot be read.
    """

    def __init__(self, files: ModelFiles, stack: ExitStack):
        self.tensors: dict[str, Any] = {}
        self.name, self._where = files.name, dict[str, Any]()
        for path in files.weights:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self.tensors[name], self._where[name] = file.get_slice(name), path
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot read {path}: {error}") from None

    def take(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Any:
        """Return a tensor that is needed in a type and shape, and leave it out of ``tensors``.

        Raises:
            ModelError: it is missing, or is another.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.name}: no file has the tensor {name}")
        found = self.tensors.pop(name)
        is_of = DTYPES.get(found.get_dtype()), tuple(found.get_shape())
        is_exact = is_of[0] in _FLOATS and dtype == torch.float32  # of scales, which are read so
        if is_of[1] != tuple(shape) or not (is_of[0] == dtype or is_exact):
            raise ModelError(
                f"{self._where[name]}: the tensor {name} is {_said(*is_of)}, and {_said(dtype, shape)} is needed"
            )
        return found

    def require_equal(self, name: str, one: Any, other: Any) -> None:
        """Raise if a tensor, the second, is not equal to that of a weight which is joined with its own.

        Raises:
            ModelError: it is not.
        """
        if not torch.equal(one[:], other[:]):
            raise ModelError(
                f"{self._where[name]}: the tensor {name} is another than that of the weight that it is "
                "computed with; use the 16-bit model instead"
            )

    def check_constants(self, name: str, values: torch.Tensor, below: int | None = None) -> None:
        """Raise if scales are not finite, or numbers of groups are none of those that there are.

        Args:
            below: how many groups there are; None is for scales.

        Raises:
            ModelError: they are.
        """
        if below is None and not values.float().isfinite().all():
            raise ModelError(f"{self._where[name]}: the tensor {name} holds NaN or infinity: the checkpoint is damaged")
        if below is not None and not ((values >= 0) & (values < below)).all():
            raise ModelError(
                f"{self._where[name]}: the tensor {name} names groups from {values.min()} to "
                f"{values.max()}, and there are {below}: the checkpoint is damaged"
            )

    def further(self, skeleton: nn.Module) -> set[str]:
        """Return the tensors of blocks that a model lacks, such as one that predicts a further token (DeepSeek-V3)."""
        paths = {path for path, _ in skeleton.named_modules()}
        blocks = {name: block for name in self.tensors if (block := _BLOCK.match(name))}
        return {name for name, block in blocks.items() if block[1] in paths and f"{block[1]}.{block[2]}" not in paths}

    def refuse_packed(self, skeleton: nn.Module) -> None:
        """Raise if one of the tensors that nothing has taken is packed; those of blocks that a model lacks may be.

        Raises:
            ModelError: it is.
        """
        for name in self.tensors.keys() - self.further(skeleton):
            if DTYPES.get(self.tensors[name].get_dtype()) not in _FLOATS:
                raise ModelError(
                    f"{self._where[name]}: the tensor {name} is packed, and what quantization_config says "
                    "of the model's layers does not say so"
                )


class _Stacked:
    """A part of the weights of a block's experts, put together when it is read: ``stacked[...]``, as slices are.

    Args:
        slices: of each expert those that are joined, none where they need no room.
        along: the dimension of one that they are joined along.
        empty: makes the tensor.
    """

    def __init__(
        self, slices: Sequence[Sequence[Any]], along: int, dtype: torch.dtype, shape: Sequence[int], empty: Empty
    ):
        self._slices, self._along, self._of, self._empty = slices, along, (shape, dtype), empty

    def __getitem__(self, _all: object) -> torch.Tensor:
        whole = self._empty(*self._of)
        for one, slices in zip(whole, self._slices, strict=True):
            for here, part in zip(one.chunk(len(slices), self._along), slices, strict=True):
                here.copy_(part[:])
        return whole


def published_state(
    files: ModelFiles, part: LanguagePart, formats: Formats, stack: ExitStack, empty: Empty | None = None
) -> dict[str, Any]:
    """Return what transformers' loader takes for a model's tensors, packed parts under the names of their modules.

    Args:
        stack: closes the files.
        empty: makes the tensors, of a shape and type, for experts that are put together; in memory, if not given.

    Raises:
        ModelError: a part is missing, or has another type or shape than the format's; or experts that are to be
            computed together differ in what they would share.
    """
    _require_alone(files, part)
    method = METHODS[part.config.quantization_config["quant_method"]]
    read, state, skeleton = _Files(files, stack), dict[str, Any](), without_weights(part.config)
    linear, experts = linear_layers(skeleton), {each.parameter_path: each for each in projections(skeleton)}
    around = {} if method.experts == "fused" else _names_of_experts(skeleton, read.tensors, method)
    for path, kind in formats:
        if path in linear:
            module, wanted = path, FORMATS[kind].parts(frozen_weight(linear[path])[0].shape)
            found = _taken(read, path, wanted, method)
        else:
            module, state[path] = experts[path].packed, placeholder()
            if method.experts == "fused":
                found = _taken(read, path, FORMATS[kind].parts(experts[path].described[0].shape), method)
            else:
                found = _stacked(read, experts[path], kind, around.get(path, {}), method, empty or _in_memory)
        state |= {f"{module}.{name}": tensor for name, tensor in found.items()}
    read.refuse_packed(skeleton)
    return read.tensors | state


def dense_tensors(files: ModelFiles, part: LanguagePart, stack: ExitStack) -> tuple[Entries, Read]:
    """Return dtype and shape of a model's tensors by the names that they would have in 16 bit, and what reads one.

    Packed weights are float32 there. Tensors of blocks that the model lacks are left out, which is logged.

    Args:
        stack: closes the files.

    Raises:
        ModelError: see ``published_state``.
    """
    _require_alone(files, part)
    method = METHODS[part.config.quantization_config["quant_method"]]
    read, skeleton = _Files(files, stack), without_weights(part.config)
    linear, experts = linear_layers(skeleton), {each.parameter_path: each for each in projections(skeleton)}
    around = {} if method.experts == "fused" else _names_of_experts(skeleton, read.tensors, method)
    packed: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {}
    for path, kind in published_formats(part.config):
        if path in linear:
            shape, names = frozen_weight(linear[path])[0].shape, {path: f"{path}.weight"}
        elif method.experts == "fused":
            shape, names = experts[path].described[0].shape, {path: path}
        else:
            *_, out, width = experts[path].described[0].shape
            shape = out // _joined(experts[path]), width
            layers = _layers_of_experts(read, experts[path], around.get(path, {}))
            names = {layer: f"{layer}.weight" for of_expert in layers for layer in of_expert}
        wanted = FORMATS[kind].parts(shape)
        packed |= {name: (kind, shape, _taken(read, layer, wanted, method)) for layer, name in names.items()}
    read.refuse_packed(skeleton)
    if further := read.further(skeleton):
        log.warning(
            "%s: %d tensors of blocks that the model lacks are left out, such as %s",
            files.name,
            len(further),
            min(further),
        )
    plain = {name: tensor for name, tensor in read.tensors.items() if name not in further}
    turned = {name for name, each in experts.items() if name in packed and each.experts.is_transposed}
    entries = {name: (DTYPES[tensor.get_dtype()], tuple(tensor.get_shape())) for name, tensor in plain.items()}
    for name, (_, of_codes, _) in packed.items():
        *leading, rows, columns = of_codes
        entries[name] = torch.float32, (*leading, columns, rows) if name in turned else tuple(of_codes)

    def dense(name: str) -> torch.Tensor:
        if name in plain:
            return plain[name][:]
        kind, shape, parts = packed[name]
        weight = FORMATS[kind].dequantize([part[:] for part in parts.values()], shape, torch.float32)
        return weight.transpose(1, 2) if name in turned else weight

    return entries, dense


def _require_alone(files: ModelFiles, part: LanguagePart) -> None:
    if part.whole is not None:
        raise ModelError(
            f"{files.name} holds its language model among other parts, which is not read packed; use the "
            "16-bit model instead"
        )


def _taken(read: _Files, path: str, wanted: Parts, method: Published) -> dict[str, Any]:
    """Return the parts of a weight, and leave out what else files have of it."""
    found = {name: read.take(f"{path}{method.parts[name]}", *each) for name, each in wanted.items()}
    for name in method.unused:
        read.tensors.pop(f"{path}{name}", None)
    if wanted["scales"][0].is_floating_point:
        read.check_constants(f"{path}{method.parts['scales']}", found["scales"][:])
    if "group" in found:
        read.check_constants(f"{path}{method.parts['group']}", found["group"][:], wanted["scales"][1][0])
    return found


def _in_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


def _names_of_experts(
    skeleton: nn.Module, stored: Iterable[str], method: Published
) -> dict[str, dict[int, tuple[str, str]]]:
    """Return what files call the layers of single experts, before and behind an expert's number.

    Returns:
        By the path of the weight of all experts, and by the number of the part of its rows: gate's and up's, or one.
    """
    end, rules = method.parts["weight"], stacking_rules(skeleton)
    names = (_EXPERT.fullmatch(name.removesuffix(end)) for name in stored if name.endswith(end))
    plain = {f"{name[1]}0{name[2]}.weight": (name[1], name[2]) for name in names if name}
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for name, (path, rule) in names_in_model(skeleton, plain).items():
        if rule in rules:
            found.setdefault(path, {})[rules[rule][0]] = plain[name]
    return found


def _layers_of_experts(read: _Files, projection: Projection, around: Mapping[int, tuple[str, str]]) -> list[list[str]]:
    """Return what files call the layers of each expert that a projection joins; ``around`` as for ``_stacked``."""
    if len(around) < _joined(projection):
        raise ModelError(f"{read.name}: no file has packed weights of single experts of {projection.parameter_path}")
    count = projection.described[0].shape[0]
    return [[f"{begin}{number}{end}" for _, (begin, end) in sorted(around.items())] for number in range(count)]


def _stacked(
    read: _Files,
    projection: Projection,
    kind: str,
    around: Mapping[int, tuple[str, str]],
    method: Published,
    empty: Empty,
) -> dict[str, Any]:
    """Return the parts of a weight of a block's experts, which files have one by one.

    Args:
        around: what their layers are called, see ``_names_of_experts``.
    """
    (count, out, width), joined = projection.described[0].shape, _joined(projection)
    layers = _layers_of_experts(read, projection, around)
    of_one, found = FORMATS[kind].parts((out // joined, width)), {}
    parts = [[_taken(read, path, of_one, method) for path in paths] for paths in layers]
    for name, (dtype, shape) in FORMATS[kind].parts((count, out, width)).items():
        slices = [[each[name] for each in of_expert] for of_expert in parts]
        along = [n for n, (one, whole) in enumerate(zip(of_one[name][1], shape[1:], strict=True)) if one != whole]
        if not along:  # those that are joined share it
            for paths, (first, *others) in zip(layers, slices, strict=True):
                for path, other in zip(paths[1:], others, strict=True):
                    read.require_equal(f"{path}{method.parts[name]}", first, other)
            slices = [each[:1] for each in slices]
        found[name] = _Stacked(slices, along[0] if along else 0, dtype, shape, empty)
    return found


def _said(dtype: torch.dtype | None, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
