"""Where a weight goes in a GGUF file, and in which layout: the part of the format that differs between families.

| model_type          | architecture   | rows of q and k   | norm weights |
|---------------------|----------------|-------------------|--------------|
| llama, mistral      | llama          | reordered (below) | as they are  |
| qwen2, qwen3, phi3  | the same names | as they are       | as they are  |
| gemma2, gemma3_text | gemma2, gemma3 | as they are       | plus one     |

llama.cpp rotates neighbouring pairs of a Llama head's rows, transformers the two halves of the head; so within each
head row i of the first half and row i of the second become rows 2i and 2i + 1. Gemma's norms multiply by 1 + w.

The first Gemma is left out: transformers does not read it back. Tensor names come from the ``gguf`` package.
Source: llama.cpp, the documentation of the GGUF format and its converter's rules.
"""

from dataclasses import dataclass
from typing import Any

import torch

from qlora_lite.errors import ModelError

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
REORDERED = ("llama",)
PLUS_ONE = ("gemma2", "gemma3")


@dataclass(frozen=True, slots=True)
class GgufNames:
    """Names and layouts of one model's weights in GGUF.

    Args:
        architecture: as GGUF calls it.
        heads: query heads.
        kv_heads: key and value heads.
        table: the name map of the ``gguf`` package.
    """

    architecture: str
    heads: int
    kv_heads: int
    table: Any

    def of(self, parameter: str) -> str:
        """Return a parameter's name in GGUF.

        Raises:
            ModelError: the architecture has no such weight there.
        """
        name = self.table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"GGUF has no place for {parameter} in the architecture {self.architecture}")
        return name

    def to_gguf(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight, a bias or a factor ``lora_B`` in GGUF's layout."""
        if heads := self._reordered_heads(parameter):
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
        return tensor + 1 if self._is_plus_one(parameter) else tensor

    def from_gguf(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """Undo ``to_gguf``."""
        if heads := self._reordered_heads(parameter):
            pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
            return pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor - 1 if self._is_plus_one(parameter) else tensor

    def _reordered_heads(self, parameter: str) -> int:
        if self.architecture not in REORDERED:
            return 0
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(parameter.split(".")[-2], 0)

    def _is_plus_one(self, parameter: str) -> bool:
        return self.architecture in PLUS_ONE and parameter.endswith("norm.weight")


def gguf_names(config) -> GgufNames:
    """Return the names for a model's transformers configuration.

    Raises:
        ModelError: the family is not one that is exported.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"models of the family {config.model_type} are not exported to GGUF; these are: {known}")
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(number, config.num_hidden_layers)
    return GgufNames(architecture, config.num_attention_heads, config.num_key_value_heads, table)
