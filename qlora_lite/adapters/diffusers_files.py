"""LoRA files as diffusers' pipelines load them: ``pytorch_lora_weights.safetensors``.

Names are paths in the pipeline with ``lora_A.weight`` and ``lora_B.weight`` behind. A file of that kind need not say
what the product is multiplied by, and programs that read one disagree about where it would stand; without, it is 1 in
all of them. So B is written multiplied by its scale, in float32 where another type would round that.
"""

import math
from pathlib import Path

import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.files import explain_write_errors
from qlora_lite.quant.tensor_file import write_tensors

from .lora.dora import DoraLinear
from .lora.inject import lora_layers, require_lora
from .lora.layer import LoraLinear

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def diffusers_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the LoRA weights of a model under the names of diffusers, B multiplied by the scale.

    Raises:
        ModelError: the model has no LoRA layers, or others than beside linear ones, or DoRA's.
    """
    require_lora(model)
    found = {}
    for path, layer in lora_layers(model):
        if not isinstance(layer, LoraLinear) or isinstance(layer, DoraLinear):
            raise ModelError(
                f"{path} is adapted by {type(layer).__name__}, and these files are for LoRA beside linear "
                "layers: set adapter.method to lora"
            )
        found[f"{path}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        found[f"{path}.lora_B.weight"] = scaled(layer.lora_B.detach(), layer.scale).cpu().contiguous()
    return found


def scaled(lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return B multiplied by a scale, in float32 where it is no power of two."""
    return (lora_b if math.frexp(scale)[0] == 0.5 else lora_b.float()) * scale


def save_for_diffusers(model: nn.Module, folder: str | Path) -> Path:
    """Write the file into a folder, which is made where it is not there; return its path.

    Raises:
        ModelError: see ``diffusers_tensors``.
        OutputError: it cannot be written.
    """
    tensors, path = diffusers_tensors(model), Path(folder) / WEIGHTS_NAME
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    return path
