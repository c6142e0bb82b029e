"""Adapter folders for peft and vLLM, and adapter files for llama.cpp.

peft
    What a run writes already, with few keys in ``adapter_config.json``: a key that an older peft does not know
    is an error there.
vLLM
    It reads ``r``, ``lora_alpha``, ``use_rslora`` and ``target_modules``, and ignores every other key without a word:
    per-layer ranks and alphas would give wrong scales (``vllm/lora/peft_helper.py``). So scales are folded into B
    and all layers get one rank (``adapters.lora.fold``).
llama.cpp
    ``BLOCK.weight.lora_a`` [r, in] and ``.lora_b`` [out, r] in a GGUF file of type "adapter", with one alpha
    (``src/llama-adapter.cpp``; scale = alpha / r of each pair). Rows of B follow the rows of the base's weight.
"""

from pathlib import Path

import torch
from torch import nn

from qlora_lite.adapters.checkpoint_names import outside
from qlora_lite.adapters.files import adapter_config, attach_adapter, detach_adapter, write_adapter
from qlora_lite.adapters.lora.fold import with_one_alpha
from qlora_lite.adapters.read import Adapter, Factors, factor_names
from qlora_lite.errors import ModelError
from qlora_lite.files import replacing_folder
from qlora_lite.models.gguf_names import GgufNames
from qlora_lite.quant.linear import stands_for_conv1d

# vLLM models that take adapters and whose layers have the names and the joins that transformers' have.
VLLM_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "cohere",
)  # fmt: skip
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank
ADAPTER_FILE = "adapter.gguf"


def write_peft(adapter: Adapter, skeleton: nn.Module, out: Path, base_model: str, tokenizer) -> None:
    """Write an adapter folder for peft.

    Args:
        skeleton: the base model on the meta device.
        base_model: what ``base_model_name_or_path`` says.
        tokenizer: with the chat template that training used.

    Raises:
        OutputError: the folder cannot be written.
    """
    with torch.no_grad():
        config = adapter_config(attach_adapter(skeleton, adapter), base_model)
    detach_adapter(skeleton)
    tensors = {}
    for name, factors in adapter.layers.items():
        name_a, name_b = factor_names(outside(skeleton, name))
        tensors |= {name_a: factors.lora_A.contiguous(), name_b: factors.lora_B.contiguous()}
    config = {key: value for key, value in config.items() if value not in ({}, False)}
    write_adapter(out, tensors, config, tokenizer)


def for_vllm(adapter: Adapter, skeleton: nn.Module, family: str) -> tuple[Adapter, int]:
    """Return an equal adapter that vLLM reads, and the ``--max-lora-rank`` it needs.

    Args:
        family: ``model_type`` of the base model's configuration.

    Raises:
        ModelError: vLLM cannot read an adapter of this rank or for this model.
    """
    if family not in VLLM_FAMILIES or any(stands_for_conv1d(skeleton.get_submodule(name)) for name in adapter.layers):
        known = ", ".join(VLLM_FAMILIES)
        raise ModelError(f"vLLM is not known to take adapters for {family} (it is for {known}); merge and serve that")
    largest = max(factors.rank for factors in adapter.layers.values())
    if largest > VLLM_RANKS[-1]:
        raise ModelError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, the adapter has {largest}; merge and serve that")
    return with_one_alpha(adapter, largest), next(rank for rank in VLLM_RANKS if rank >= largest)


def write_gguf_adapter(adapter: Adapter, names: GgufNames, out: Path) -> None:
    """Write an adapter file for llama.cpp's ``--lora`` into a new folder.

    Raises:
        ModelError: an adapted layer has no name in GGUF.
        OutputError: the folder cannot be written.
    """
    from gguf import GGUFWriter, Keys

    folded = with_one_alpha(adapter)
    with replacing_folder(out) as new:
        writer = GGUFWriter(new / ADAPTER_FILE, names.architecture)
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, next(iter(folded.layers.values())).alpha)
        for path, factors in folded.layers.items():
            name = names.of(f"{path}.weight")
            rows = names.to_gguf(f"{path}.weight", factors.lora_B.float())
            writer.add_tensor(f"{name}.lora_a", factors.lora_A.float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", rows.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf_adapter(path: Path, names: GgufNames, adapted: list[str]) -> Adapter:
    """Read an adapter file as llama.cpp does.

    Args:
        adapted: paths of the layers that it must adapt.

    Raises:
        ModelError: it is no adapter, or a pair is missing.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (fields.get("general.type"), fields.get("adapter.type")) != ("adapter", "lora"):
        raise ModelError(f"{path} is not a LoRA adapter")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layers = {}
    for path_in_model in adapted:
        parameter = f"{path_in_model}.weight"
        pair = [tensors.get(f"{names.of(parameter)}.lora_{side}") for side in "ab"]
        if any(part is None for part in pair):
            raise ModelError(f"{path} has no factors for {path_in_model}")
        lora_a, lora_b = pair[0], names.from_gguf(parameter, pair[1])
        layers[path_in_model] = Factors(lora_a, lora_b.contiguous(), float(fields["adapter.lora.alpha"]))
    return Adapter(layers, 0.0)
