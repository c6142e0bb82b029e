"""Adapter folders for peft and vLLM, and adapter files for llama.cpp.

peft
    What a run writes already, with few keys in ``adapter_config.json``: a key that an older peft does not know
    is an error there.
vLLM
    It reads ``r``, ``lora_alpha``, ``use_rslora`` and ``target_modules``, and ignores every other key without a word:
    per-layer ranks and alphas would give wrong scales (``vllm/lora/peft_helper.py``). So scales are folded into B
    and all layers get one rank (``with_one_scaling``).
llama.cpp
    ``BLOCK.weight.lora_a`` [r, in] and ``.lora_b`` [out, r] in a GGUF file of type "adapter", with one alpha
    (``src/llama-adapter.cpp``; scale = alpha / r of each pair). Rows of B follow the rows of the base's weight.

The adapted weight is W + s_i B_i A_i with a scale of its own for each layer. A reader that takes one alpha for all
computes alpha / r_i (or, with one rank R, alpha / R). So the commonest alpha is kept, B_i is multiplied by what is
missing, and factors of a smaller rank get rows and columns of zeros, which add nothing. Layers that have the common
scale already keep their bits; the others are written in float32 where the product is not exact in their own type.

Shapes: A [r, in], B [out, r]; R the common rank.
"""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from qlora_lite.adapters.checkpoint_names import outside
from qlora_lite.adapters.files import adapter_config, attach_adapter, detach_adapter, write_adapter
from qlora_lite.adapters.fused_names import why_no_dora
from qlora_lite.adapters.parts import TOKEN_ROWS
from qlora_lite.adapters.read import Adapter, Factors, stored_names, tensor_names, weight_name
from qlora_lite.errors import ModelError
from qlora_lite.files import replacing_folder
from qlora_lite.models.gguf_names import GgufNames
from qlora_lite.quant.linear import stands_for_conv1d

# vLLM models that take adapters and whose layers have the names and the joins that transformers' have.
VLLM_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "cohere",
)
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
    detach_adapter(skeleton, {})
    tensors: dict[str, torch.Tensor] = {}
    stored = stored_names(skeleton, adapter.layers)
    for name, factors in adapter.layers.items():
        names = tensor_names(stored[name])
        tensors |= {names[leaf]: tensor.contiguous() for leaf, tensor in factors.tensors.items()}
    adapted = {outside(skeleton, name) for name in adapter.layers}
    tables = config.get("trainable_token_indices", ())  # of tied ones the embeddings alone, as ``save_adapter`` has it
    weights = {outside(skeleton, path): weight for path, weight in adapter.weights.items()}
    tensors |= {
        weight_name(path, adapted): weight
        for path, weight in weights.items()
        if not path.endswith(TOKEN_ROWS) or path.removesuffix(f".{TOKEN_ROWS}") in tables
    }
    config = {key: value for key, value in config.items() if value not in ({}, False)}
    write_adapter(out, tensors, config, tokenizer)


def refuse_dora_without_peft(adapter: Adapter, skeleton: nn.Module) -> None:
    """Check that peft loads an adapter.

    Raises:
        ModelError: it is DoRA, of layers that peft has none for.
    """
    if adapter.is_dora and (why := why_no_dora(skeleton, adapter.layers)):
        raise ModelError(f"the adapter is DoRA, and {why}")


def for_vllm(adapter: Adapter, skeleton: nn.Module, family: str) -> tuple[Adapter, int]:
    """Return an equal adapter that vLLM reads, and the ``--max-lora-rank`` it needs.

    Args:
        family: ``model_type`` of the base model's configuration.

    Raises:
        ModelError: vLLM cannot read an adapter of this method or rank, or for this model.
    """
    refuse_all_but_lora(adapter, "vLLM")
    if family not in VLLM_FAMILIES or any(stands_for_conv1d(skeleton.get_submodule(name)) for name in adapter.layers):
        known = ", ".join(VLLM_FAMILIES)
        raise ModelError(f"vLLM is not known to support adapters for {family} (but for {known}); merge and serve that")
    largest = max(factors.rank for factors in adapter.layers.values())
    if largest > VLLM_RANKS[-1]:
        raise ModelError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, the adapter has {largest}; merge and serve that")
    return with_one_scaling(adapter, largest), next(rank for rank in VLLM_RANKS if rank >= largest)


def refuse_all_but_lora(adapter: Adapter, program: str) -> None:
    """Check that an adapter is LoRA, for a program that would leave all else out.

    Raises:
        ModelError: it is DoRA, or has weights for fused experts, or weights of the base that were trained too.
    """
    merged = "`qlora-lite merge`, or export --to gguf or ollama, writes a merged model, which needs none"
    if any(factors.experts > 1 for factors in adapter.layers.values()):
        raise ModelError(
            f"the adapter has LoRA weights for fused experts, and {program} takes linear layers' alone; "
            "`qlora-lite merge` writes a merged model, which needs none"
        )
    if adapter.is_dora:
        raise ModelError(f"the adapter is DoRA, and {program} takes LoRA alone, without DoRA's magnitudes; {merged}")
    if adapter.weights:
        first = next(iter(adapter.weights))
        raise ModelError(
            f"the adapter has weights of the base that were trained too, first {first}, and {program} "
            f"takes LoRA alone; {merged}"
        )


def with_one_scaling(adapter: Adapter, rank: int | None = None) -> Adapter:
    """Return an equal adapter whose layers share one alpha and plain scales (alpha / r).

    Args:
        adapter: any; it is left as it is.
        rank: the rank that every layer gets, at least the largest; None leaves each its own.
    """
    alphas = {name: factors.scale * (rank or factors.rank) for name, factors in adapter.layers.items()}
    values = list(alphas.values())
    alpha = max(values, key=values.count)
    gains = {name: value / alpha for name, value in alphas.items()}
    dtypes = {factors.lora_A.dtype for factors in adapter.layers.values()}
    is_exact = len(dtypes) == 1 and all(map(_is_exact, gains.values()))
    dtype = dtypes.pop() if is_exact else torch.float32
    layers = {
        name: _folded(factors, alpha, gains[name], rank or factors.rank, dtype)
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.dropout)


def _is_exact(gain: float) -> bool:
    """Return whether multiplying by a number only moves the exponent."""
    return abs(math.frexp(gain)[0]) == 0.5


def _folded(factors: Factors, alpha: float, gain: float, rank: int, dtype: torch.dtype) -> Factors:
    missing = rank - factors.rank
    lora_a = functional.pad(factors.lora_A, (0, 0, 0, missing)).to(dtype).contiguous()
    lora_b = functional.pad((factors.lora_B.float() * gain).to(dtype), (0, missing)).contiguous()
    return Factors(lora_a, lora_b, alpha)


def write_gguf_adapter(adapter: Adapter, names: GgufNames, out: Path) -> None:
    """Write an adapter file for llama.cpp's ``--lora`` into a new folder.

    Raises:
        ModelError: an adapted layer has no name in GGUF.
        OutputError: the folder cannot be written.
    """
    from gguf import GGUFWriter, Keys

    folded = with_one_scaling(adapter)
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
        lora_a, stored_b = (tensors.get(f"{names.of(parameter)}.lora_{side}") for side in "ab")
        if lora_a is None or stored_b is None:
            raise ModelError(f"{path} has no LoRA weights for {path_in_model}")
        lora_b = names.from_gguf(parameter, stored_b)
        layers[path_in_model] = Factors(lora_a, lora_b.contiguous(), float(fields["adapter.lora.alpha"]))
    return Adapter(layers, 0.0)
