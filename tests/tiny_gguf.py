"""Tiny GGUF files whose linear layers are of any of GGUF's types, mixed as llama.cpp mixes them."""

from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tiny import build_tiny
from tiny_files import MERGES, VOCABULARY, byte_tokenizer

from qlora_lite.ext.gguf.config import write_config
from qlora_lite.ext.gguf.tokenizer import write_tokenizer
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.quant.formats.gguf_blocks import GGUF_BLOCKS

WIDE = {"hidden_size": 256, "intermediate_size": 512}  # rows of whole blocks
SCALES = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2)}  # places, else 0
K_SCALE = 2e-4  # of blocks with scales in them, so that weights are about as large as in a model


def random_codes(name: str, shape: tuple[int, ...], seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    """Return bytes of a weight, each value of a byte among them, with scales of both signs, tiny and zero ones too."""
    kind, generator = GGUF_BLOCKS[name], np.random.default_rng(seed)
    (_, size) = kind.parts(shape)["weight"]
    codes = generator.integers(0, 256, size, dtype=np.uint8).reshape(-1, kind.block_bytes)
    for place in SCALES.get(name, (0,)):
        scales = generator.normal(0, scale, len(codes)).astype(np.float16)
        scales[:3] = 0, 1e-7, -0.0
        codes[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(codes.reshape(size))


def write_tiny_gguf(path: Path, family: str = "llama", types=("q4_k", "q6_k", "q8_0"), leave_out="", **changes) -> Path:
    """Write a random model whose matrices are of these types in turn, the embeddings of the last.

    Args:
        leave_out: name of a tensor that the file lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build_tiny(family, vocab_size=VOCABULARY, **(WIDE | changes))
    names, kinds = gguf_names(model.config), cycle(types)
    writer = GGUFWriter(path, names.architecture)
    writer.add_type("model")
    write_config(writer, model.config, names.architecture)
    write_tokenizer(writer, byte_tokenizer(merges=MERGES), VOCABULARY, (4,), None)
    for number, (parameter, value) in enumerate(model.named_parameters()):  # tied ones once
        name, tensor = names.of(parameter), names.to_gguf(parameter, value.detach()).contiguous().numpy()
        kind = "f32" if value.ndim == 1 else types[-1] if "embed" in parameter else next(kinds)
        number_of_kind = GGMLQuantizationType[kind.upper()]
        if kind in ("q4_k", "q5_k", "q6_k"):
            stored = random_codes(kind, tensor.shape, number, K_SCALE).numpy()
        else:
            stored = quants.quantize(tensor, number_of_kind)
        if name != leave_out:
            writer.add_tensor(name, stored, raw_dtype=number_of_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
