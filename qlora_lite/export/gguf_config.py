"""What a GGUF file says about a model: shapes, rotary positions, attention windows.

A setting that llama.cpp computes otherwise, or not at all, would give a file that loads and answers wrongly; every such
setting is refused here by name, except where it only shows in texts longer than a window: that is a note.
"""

import math
from typing import Any

import torch

from qlora_lite.errors import ModelError

ACTIVATIONS = {"silu": ("llama", "qwen2", "qwen3"), "gelu_pytorch_tanh": ("gemma2", "gemma3")}
# Every how many blocks one attends to everything; llama.cpp has these numbers in its code.
FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3": 6}
LOCAL_ROPE_THETA = 10_000.0  # of Gemma 3's windowed blocks


def write_config(writer, config, architecture: str) -> list[str]:
    """Write a model's settings; return notes on what differs.

    Args:
        writer: a ``gguf.GGUFWriter`` of the architecture.
        config: the model's transformers configuration.

    Raises:
        ModelError: llama.cpp does not compute one of the settings.
    """
    _check(config, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    _write_rope(writer, config)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture in FULL_ATTENTION_EVERY:
        writer.add_sliding_window(config.sliding_window)
        return []
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        return [f"llama.cpp has no attention window for this model: texts over {window} tokens are attended whole"]
    return []


def _check(config, architecture: str) -> None:
    wrong = []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if architecture not in ACTIVATIONS.get(activation, ()):
        wrong.append(f"activation {activation}")
    every = FULL_ATTENTION_EVERY.get(architecture)
    layers = getattr(config, "layer_types", None)
    if every and layers:
        expected = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(len(layers))]
        if layers != expected:
            wrong.append(f"layer_types {layers}")
    if architecture == "gemma3" and _rope(config, "sliding_attention")["rope_theta"] != LOCAL_ROPE_THETA:
        wrong.append(f"a rope_theta of windowed blocks other than {LOCAL_ROPE_THETA:g}")
    if (scale := getattr(config, "query_pre_attn_scalar", None)) and scale not in _known_scales(config):
        wrong.append(f"query_pre_attn_scalar {scale}")
    if getattr(config, "use_bidirectional_attention", None):
        wrong.append("use_bidirectional_attention")
    if _rope(config)["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        wrong.append(f"rope_type {_rope(config)['rope_type']}")
    if wrong:
        raise ModelError(f"llama.cpp does not compute this model's {', '.join(wrong)}; no GGUF file is written")


def _known_scales(config) -> set[float]:
    """Return the attention scales that llama.cpp assumes: the head's size, and that of the 27B models."""
    known = {config.head_dim}
    if config.num_hidden_layers in (46, 62):
        known.add(config.hidden_size // config.num_attention_heads)
    return known


def _rope(config, layer_type: str = "full_attention") -> dict[str, Any]:
    parameters = config.rope_parameters
    return {"rope_type": "default"} | dict(parameters.get(layer_type) or parameters)


def _write_rope(writer, config) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def rope_factors(config) -> torch.Tensor | None:
    """Return what Llama 3 divides each rotary frequency by, float32 [head_dim / 2]; None for other models.

    llama.cpp has no rule for it and reads the factors from the file. Source: Llama 3.1's published reference code.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the first context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
