"""Write a model as an ordinary checkpoint that transformers loads, a quantised one as bitsandbytes would.

transformers loads no experts in 4 bit. A model that has some is written for the cache alone, under this package's own
names; ``quantizer`` loads it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from qlora_lite.adapters.checkpoint_names import prefixes_of
from qlora_lite.adapters.lora.inject import linear_layers
from qlora_lite.adapters.lora.start import First
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import expert_weights, packs_experts, placeholders
from qlora_lite.files import remove_old_leftovers, replacing_folder
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import QuantLinear, is_conv1d, is_linear_16_bit
from qlora_lite.quant.nf4 import to_bnb_state
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.quant.tensor_file import write_tensors

from .cache import write_sums
from .heads import new_weights
from .locate import INDEX_NAME
from .quantizer import QuantizeConfig
from .split import write_first

SHARD_BYTES = 4 * 2**30


class Elsewhere(Protocol):
    """A tensor, or what stands for one that ``cpu`` has to fetch first (``train.whole_tensors.Whole``)."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    def cpu(self) -> torch.Tensor:
        """Return the tensor, in host memory."""


def quantized_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's tensors under bitsandbytes' names; a tied tensor appears once."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    plain = _each_once(model)
    state = {
        name: tensor
        for name, tensor in plain.items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    for path, layer in layers.items():
        shape, dtype = (layer.out_features, layer.in_features), model.dtype
        for key, value in to_bnb_state(layer.packed, shape, dtype, layer.quant_type).items():
            state[f"{path}.weight.{key}".rstrip(".")] = value
    return state


def _each_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors by their first names."""
    names: dict[int, str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        names.setdefault(tensor.data_ptr(), name)
    return {name: state[name] for name in names.values()}


def _owned(tensor: Elsewhere) -> torch.Tensor:
    """Return a contiguous host tensor; small tables shared between layers are copied, as the format wants."""
    found = tensor.cpu().contiguous()
    return found.clone() if found.numel() <= 256 else found


def bnb_config(model: nn.Module) -> dict:
    """Return what a checkpoint's configuration says of a model's 4-bit layers; a skeleton is enough.

    Raises:
        ModelError: the model has no 4-bit layers, or some that transformers could not load (Falcon's, experts), or it
            keeps codes of other formats.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    if not layers:
        raise ModelError("the model has no 4-bit layers to save")
    if kept := sorted({layer.quant_type for layer in layers} - FOUR_BIT.keys()):
        raise ModelError(f"the model is quantised already, and keeps its codes ({', '.join(kept)})")
    foreign = sorted({layer.replaces for layer in layers} - {"Linear", "Conv1D"})
    if packs_experts(model):
        raise ModelError("transformers does not load experts in 4 bit; qlora-lite quantises the 16-bit model itself")
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
        ModelError: see ``bnb_config``.
        OutputError: the folder cannot be written.
    """
    _write(model, folder, bnb_config(model), quantized_state(model), tokenizer)


def save_for_cache(model: nn.Module, folder: Path, first: First | None = None) -> None:
    """Write the model for ``load`` alone: as ``save_quantized`` does, or, with experts in 4 bit, under our own names.

    Args:
        first: what its LoRA weights begin as, of a model whose weights were split.

    Raises:
        ModelError, OutputError: see ``save_quantized``.
    """
    if missing := placeholders(model):
        packed = next(module for module in model.modules() if isinstance(module, PackedWeight))
        kept = [path for path, layer in linear_layers(model).items() if is_linear_16_bit(layer)]
        kept += [path for path, each in expert_weights(model).items() if each.described[0].quant_type is None]
        config = QuantizeConfig(packed.quant_type, packed.double_quant, keep_16bit=kept).to_dict()
        state = _each_once(model) | missing
    else:
        config, state = bnb_config(model), quantized_state(model)
    state = {name: tensor for name, tensor in state.items() if name not in new_weights(model)}
    remove_old_leftovers(folder.parent)
    _write(model, folder, config, state, with_sums=True, first=first)


def save_model(
    model: nn.Module,
    folder: Path,
    tokenizer,
    end_token_ids: Collection[int] = (),
    elsewhere: Mapping[str, Elsewhere] | None = None,
) -> None:
    """Write a model in 16 bit or more, its configuration and the tokenizer to a folder, all or nothing.

    Tensors have the names that files of this architecture have (experts one by one, say), but for a language model that
    was taken out of a larger one: it is written as one of its own.

    Args:
        end_token_ids: tokens that end an answer, for the generation configuration.
        elsewhere: weights that are not whole in the model, by their names in it: fetched for one file at a time, or for
            all where files have other tensors than the model.

    Raises:
        ModelError: a weight is not finite.
        OutputError: the folder cannot be written.
    """
    state, elsewhere = _each_once(model), elsewhere or {}
    here = {name: tensor for name, tensor in state.items() if name not in elsewhere}
    if broken := next((name for name, tensor in here.items() if not tensor.isfinite().all()), None):
        raise ModelError(f"the model is not saved: its weight {broken} is not finite")
    if prefixes_of(model) is None:
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        reverted = revert_weight_conversion(model, dict(shapes))
        if any(reverted.get(name) is not tensor for name, tensor in shapes.items()):
            here |= {name: tensor.cpu() for name, tensor in elsewhere.items()}
            state, elsewhere = revert_weight_conversion(model, {name: here[name] for name in state}), {}
    generation = model.generation_config.to_diff_dict() if model.can_generate() else None
    if generation is not None and (ends := sorted({*end_token_ids, tokenizer.eos_token_id} - {None})):
        generation["eos_token_id"] = ends
    _write(model, folder, None, state | dict(elsewhere), tokenizer, generation=generation)


def _write(
    model: nn.Module,
    folder: Path,
    quantization: dict | None,
    state: Mapping[str, Elsewhere],
    tokenizer=None,
    with_sums=False,
    generation: dict | None = None,
    first: First | None = None,
) -> None:
    config = {**model.config.to_diff_dict(), "use_cache": True, "architectures": [type(model).__name__]}
    if quantization is None:
        config |= {"dtype": str(model.dtype).removeprefix("torch.")}
    else:
        config |= {"quantization_config": quantization}
    sizes = {
        name: tensor
        if isinstance(tensor, torch.Tensor)
        else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in state.items()
    }
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    with replacing_folder(folder) as new:
        for file, names in plan.filename_to_tensors.items():
            shard = {name: _owned(state[name]) for name in names}
            write_tensors(new / file, shard)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (new / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
        (new / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
        if generation is not None:
            (new / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        elif model.can_generate():
            model.generation_config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if first is not None:
            write_first(new, first)
        if with_sums:
            write_sums(new)
