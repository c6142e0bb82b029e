"""Write a quantised model as an ordinary bitsandbytes checkpoint that transformers loads."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.files import replacing_folder
from qlora_lite.quant.linear import QuantLinear, is_conv1d
from qlora_lite.quant.nf4 import to_bnb_state
from qlora_lite.quant.tensor_file import write_tensors

from .locate import INDEX_NAME

SHARD_BYTES = 4 * 2**30


def quantized_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's tensors under bitsandbytes' names; a tied tensor appears once."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        path = name.rpartition(".")[0]
        if (path in layers and not name.endswith(".bias")) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        state[name] = tensor
    for path, layer in layers.items():
        shape, dtype = (layer.out_features, layer.in_features), model.dtype
        for key, value in to_bnb_state(layer.packed, shape, dtype, layer.quant_type).items():
            state[f"{path}.weight.{key}".rstrip(".")] = value
    return state


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous host tensor; small tables shared between layers are copied, as the format wants."""
    tensor = tensor.cpu().contiguous()
    return tensor.clone() if tensor.numel() <= 256 else tensor


def _quantization_config(model: nn.Module) -> dict:
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if not layers:
        raise ModelError("the model has no 4-bit layers to save")
    foreign = sorted({layer.replaces for layer in layers} - {"Linear", "Conv1D"})
    if foreign:
        raise ModelError(f"transformers does not load 4-bit weights into layers of class {', '.join(foreign)}")
    skipped = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": layers[0].quant_type,
        "bnb_4bit_use_double_quant": layers[0].double_quant,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def save_quantized(model: nn.Module, folder: Path, tokenizer=None) -> None:
    """Write the model, its configuration and the tokenizer if given to a folder, all or nothing.

    Raises:
        ModelError: the model has no 4-bit layers, or some that transformers could not load (Falcon's).
        OutputError: the folder cannot be written.
    """
    config = {**model.config.to_diff_dict(), "quantization_config": _quantization_config(model), "use_cache": True,
              "architectures": [type(model).__name__]}  # fmt: skip
    state = quantized_state(model)
    plan = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
    with replacing_folder(folder) as new:
        for file, names in plan.filename_to_tensors.items():
            shard = {name: _owned(state[name]) for name in names}
            write_tensors(new / file, shard)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (new / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
        (new / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
        if model.can_generate():
            model.generation_config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
