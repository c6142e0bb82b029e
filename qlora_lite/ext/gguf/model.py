"""Write a merged model as one GGUF file, weight by weight.

The ``gguf`` package writes the file; the weights come from ``models.merge`` one at a time, rounded once to what the
file holds. Vectors stay float32, as llama.cpp expects.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from math import prod
from pathlib import Path

import numpy as np
import torch

from qlora_lite.errors import ModelError
from qlora_lite.files import require_space
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.models.gguf_settings import ROPE_FACTORS, rope_factors
from qlora_lite.models.merge import Merged

from .config import write_config
from .tokenizer import write_tokenizer

MODEL_FILE = "model.gguf"
# -> llama.cpp's name of the file type
KINDS = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
SPARE_BYTES = 32 * 2**20  # of disk: tokenizer and settings
CHUNK_ROWS = 2048  # quantised or read back at once; the package makes several copies


def write_gguf(
    merged: Merged,
    folder: Path,
    kind: str,
    name: str,
    tokenizer,
    end_token_ids: tuple[int, ...],
    adds_begin: bool | None = None,
    chosen: Mapping[str, torch.Tensor] | None = None,
) -> list[str]:
    """Write ``model.gguf`` into a folder that exists; return notes on what differs from the trained model.

    Args:
        kind: one of KINDS, for the matrices.
        name: of the model, for people.
        tokenizer: with the chat template that training used.
        end_token_ids: tokens that training taught as ends of an answer.
        adds_begin: see ``write_tokenizer``.
        chosen: weights in Q4_0 blocks by parameter, see ``own_codes.q4_0_weights``; others are rounded to nearest.

    Raises:
        ModelError: llama.cpp cannot compute the family, a setting or the tokenizer.
        OutputError: the disk has no room.
    """
    from gguf import GGUFWriter, LlamaFileType, quants

    names = gguf_names(merged.config)
    writer = GGUFWriter(folder / MODEL_FILE, names.architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[KINDS[kind]])
    writer.add_quantization_version(2)
    notes = write_config(writer, merged.config, names.architecture)
    write_tokenizer(writer, tokenizer, merged.config.vocab_size, end_token_ids, adds_begin)
    planned, total_bytes = list(_planned(merged, kind)), SPARE_BYTES
    factors = rope_factors(merged.config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), 4 * len(factors))
    for _, parameter, shape, stored_as in planned:
        size_bytes = prod(quants.quant_shape_to_byte_shape(shape, stored_as))
        writer.add_tensor_info(names.of(parameter), shape, np.dtype(np.float32), size_bytes, raw_dtype=stored_as)
        total_bytes += size_bytes
    require_space(folder.parent, total_bytes)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for stored, parameter, _, stored_as in planned:
            if chosen and parameter in chosen:
                writer.write_tensor_data(names.to_gguf(parameter, chosen[parameter]).contiguous().numpy())
                continue
            tensor = names.to_gguf(parameter, merged.weight(stored, _made_in(stored_as))).contiguous()
            writer.write_tensor_data(_as_stored(tensor, stored_as, parameter))
            del tensor  # before the next one is made
    return notes


def in_q4_0(merged: Merged) -> dict[str, str]:
    """Return the stored names of the layers whose weights a q4_0 file has in Q4_0, by parameter."""
    return {
        parameter: stored for stored, parameter, _, stored_as in _planned(merged, "q4_0") if stored_as.name == "Q4_0"
    }


def _planned(merged: Merged, kind: str) -> Iterator[tuple]:
    """Yield stored name, parameter, shape and GGUF type of every tensor of the file."""
    entries = merged.entries(torch.float32)
    for stored, parameter in merged.base.parameters.items():
        if parameter != "lm_head.weight" or not merged.config.tie_word_embeddings:
            shape = entries[stored][1]
            yield stored, parameter, shape, _stored_type(parameter, shape, kind)


def _stored_type(parameter: str, shape: tuple[int, ...], kind: str):
    """Return the GGUF type of a tensor, as llama.cpp's own converter chooses it.

    Embeddings and head have 8 bits beside 4-bit layers: llama.cpp gives them 6, which the ``gguf`` package does
    not write.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    is_table = parameter.endswith(("embed_tokens.weight", "lm_head.weight"))
    wanted = GGMLQuantizationType["Q8_0" if kind == "q4_0" and is_table else kind.upper()]
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted  # no whole blocks in a row


def _made_in(stored_as) -> torch.dtype:
    """Return the type to make a tensor in: the file's own, so that no float32 copy of a large one is held beside it."""
    from gguf import GGMLQuantizationType

    halves = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    return halves.get(stored_as, torch.float32)


def as_read(parameter: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what a reader gets of a weight that a file of a kind holds, in float32; beside it, memory for a chunk."""
    from gguf import dequantize

    stored_as = _stored_type(parameter, tuple(weight.shape), kind)
    read = torch.empty(weight.shape, dtype=torch.float32)
    for part, chunk in zip(read.split(CHUNK_ROWS), weight.split(CHUNK_ROWS), strict=True):
        stored = _as_stored(chunk.float(), stored_as, "it")
        part.copy_(torch.from_numpy(dequantize(stored.view(np.uint8), stored_as)))
    return read


def _as_stored(tensor: torch.Tensor, stored_as, parameter: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    if stored_as == GGMLQuantizationType.F32:
        return tensor.numpy()
    if stored_as == GGMLQuantizationType.BF16:
        return tensor.bfloat16().view(torch.int16).numpy()
    low, high = torch.aminmax(tensor)
    if not max(-low, high) <= torch.finfo(torch.float16).max:
        raise ModelError(f"{parameter} has values beyond the range of float16; export it with --dtype bf16")
    if stored_as == GGMLQuantizationType.F16:
        return tensor.half().numpy()
    chunks = [quants.quantize(chunk.numpy(), stored_as) for chunk in tensor.split(CHUNK_ROWS)]
    return np.concatenate(chunks)
