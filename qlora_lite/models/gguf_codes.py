"""Read the tensors of a GGUF file of a family that ``gguf_names`` knows.

With ``model.quant: keep`` codes of linear layers stay as they are and all else is in the compute type. The model that
is trained is then, weight for weight, the one that llama.cpp and Ollama serve from that file. Codes stay in the file,
which the process sees as memory, but for those of rows that llama.cpp orders otherwise: blocks lie along rows, so that
reordering a weight's rows is reordering those of its codes.

Without codes that stay it is what transformers would dequantise, to the bit, in a fraction of the time: its reader
makes an array of every word of the vocabulary, and a table of all names for every tensor.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.adapters.parts import head_parameters
from qlora_lite.errors import ModelError
from qlora_lite.quant.formats.gguf_blocks import GGUF_BLOCKS

from .gguf_header import Header, read_header
from .gguf_names import ARCHITECTURES, GgufNames, gguf_names
from .locate import ModelFiles
from .nested import without_weights

log = logging.getLogger("qlora_lite")

Formats = tuple[tuple[str, str], ...]  # the format of each layer whose codes are kept, by path
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_KEEP = "model.quant keep trains on the codes of a GGUF file"


def kept_formats(files: ModelFiles, config) -> Formats:
    """Return the formats of a model's linear layers that keep their codes; the others are in 16 bit, as the head is.

    Raises:
        ModelError: the files have no codes that are known here.
    """
    if not files.gguf_file:
        raise ModelError(f"{_KEEP}, and {files.name} has 16-bit weights; write nf4, fp4 or none")
    skeleton = without_weights(config)
    _, places, header = _contents(files, skeleton)
    kinds = {parameter: _kind(header.tensors[name][1]) for name, parameter in places.items()}
    found = {path: kinds[f"{path}.weight"] for path in linear_layers(skeleton)}
    formats = tuple((path, kind) for path, kind in found.items() if kind in GGUF_BLOCKS)
    if not formats:
        raise ModelError(
            f"{_KEEP}, and {files.name} has none in its linear layers that is known here (its types are "
            f"{', '.join(sorted({*found.values()}))}); write nf4, fp4 or none"
        )
    return formats


def read_codes(
    files: ModelFiles,
    config,
    formats: Formats,
    dtype: torch.dtype,
    put: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return a model's tensors on the host: codes of the layers with formats, and what else there is in a type.

    Args:
        put: given codes that are no longer those of the file, returns a copy elsewhere than in memory.

    Raises:
        ModelError: a tensor is missing, or has another shape than the model's.
    """
    names, places, header = _contents(files, without_weights(config))
    content, kept = np.memmap(files.weights[0], np.uint8, mode="c"), dict(formats)  # what is written stays in memory
    state, others = {}, Counter[str]()
    for name, parameter in places.items():
        (start, number, shape), (path, _, leaf) = header.tensors[name], parameter.rpartition(".")
        stored = torch.from_numpy(content[start : start + stored_bytes(number, shape)])
        if leaf != "weight" or path not in kept:
            state[parameter] = dense(names, parameter, stored, number, shape, dtype)
            others[_kind(number)] += 1
            continue
        (_, size) = GGUF_BLOCKS[kept[path]].parts(shape)["weight"]
        codes = names.from_gguf(parameter, stored.view(size))
        is_moved = codes.data_ptr() != stored.data_ptr()
        state[parameter] = put(codes) if put is not None and is_moved else codes
    unknown = {kind: count for kind, count in others.items() if kind not in _FLOATS and kind not in GGUF_BLOCKS}
    if formats and unknown:
        said = ", ".join(f"{count} of type {kind}" for kind, count in unknown.items())
        log.warning("weights of %s whose codes are not known here are in 16 bit: %s", files.name, said)
    return state


def _contents(files: ModelFiles, skeleton: nn.Module) -> tuple[GgufNames, Mapping[str, str], Header]:
    """Return the names of a file's family, the parameter by the name in the file, and the header."""
    config, path = skeleton.config, files.weights[0]
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{_KEEP} of one of the families {', '.join(ARCHITECTURES)}, and {files.name} is a "
            f"{config.model_type}; write nf4, fp4 or none"
        )
    names, header, wanted = gguf_names(config), read_header(path), skeleton.state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    added = head_parameters(skeleton)  # which no file has
    places = {names.of(parameter): parameter for parameter in wanted if parameter not in added}
    for name, parameter in places.items():
        if name not in header.tensors:
            raise ModelError(f"{path} has no tensor {name}")
        if (found := header.tensors[name][2]) != (shape := tuple(wanted[parameter].shape)):
            raise ModelError(f"{path}: the tensor {name} has the shape {found}, and {shape} is needed")
    return names, places, header


def _kind(number: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(number).name.lower()


def stored_bytes(number: int, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor of a type, as GGUF numbers it, in a file."""
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[number]  # keys are int enums
    return prod(shape) // block * block_bytes


def dense(
    names: GgufNames, parameter: str, stored: torch.Tensor, number: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return a parameter in a type, from its bytes in a file; what is added to norms is added in float32, before that.

    Args:
        number: of the type in the file.
    """
    from gguf import dequantize

    kind, exact = _kind(number), torch.float32 if len(shape) == 1 else dtype
    if kind in _FLOATS:
        values = stored.view(_FLOATS[kind]).view(shape).to(exact)
    elif kind in GGUF_BLOCKS:
        values = GGUF_BLOCKS[kind].dequantize([stored], shape, exact)
    else:
        values = torch.from_numpy(dequantize(stored.numpy(), number)).view(shape).to(exact)
    return names.from_gguf(parameter, values).to(dtype)
