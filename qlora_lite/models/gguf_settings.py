"""What a GGUF file says about rotary positions and attention, in transformers' words: read and written by these tables.

transformers' reader leaves all of this out and takes the family's defaults, so that a Llama 3.1 would be trained
without its rotary scaling. What is said here maps exactly; whatever else a file scales is refused by name.

llama.cpp has no rule for Llama 3's rotary scaling and reads a factor for each frequency (``rope_freqs.weight``); here
the rule is found again, and taken if it gives the file's numbers.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_lite.errors import ModelError

from .gguf_header import Header, read_header
from .gguf_names import ARCHITECTURES

ROPE_FACTORS, ROTATED = "rope_freqs.weight", "rope.dimension_count"
SCALING, SCALING_TYPE, LOCAL_THETA = "rope.scaling.", "rope.scaling.type", "rope.freq_base_swa"
# rope_type -> setting of transformers -> key behind SCALING
SCALINGS = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    },
}
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # both worlds call them so
# Keys that scale something for which there is no setting here -> the values that change nothing.
REFUSED = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}
KNOWN = {SCALING_TYPE, f"{SCALING}finetuned", *REFUSED, *(SCALING + key for key in SCALINGS["yarn"].values())}
ACTIVATIONS = {"silu": ("llama", "qwen2", "qwen3", "phi3"), "gelu_pytorch_tanh": ("gemma2", "gemma3")}
# Every how many blocks one attends to everything; llama.cpp has these numbers in its code.
FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3": 6}
LOCAL_ROPE_THETA = 10_000.0  # of Gemma 3's windowed blocks
_FIRST_CONTEXT = 8192  # Llama 3's, where no factor tells it
_FLOAT32 = 0  # as GGUF numbers it


def head_size(config) -> int:
    """Return the numbers in a head's query."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config, layer_type: str = "full_attention") -> dict[str, Any]:
    """Return the rotary settings of a kind of block."""
    parameters = config.rope_parameters
    return {"rope_type": "default"} | dict(parameters.get(layer_type) or parameters)


def rope_factors(config) -> torch.Tensor | None:
    """Return what Llama 3 divides each rotary frequency by, float32 [head_dim / 2]; None for other models.

    Source: Llama 3.1's published reference code.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * _frequencies(config) / (2 * math.pi)  # within the first context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _frequencies(config) -> torch.Tensor:
    size = head_size(config)
    return 1.0 / rope_of(config)["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)


def attention_scalar(config) -> float:
    """Return the number whose root llama.cpp divides a Gemma's scores by; it knows the 27B models by their depth."""
    is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    return config.hidden_size // config.num_attention_heads if is_27b else config.head_dim


def check_config(config, architecture: str) -> None:
    """Refuse settings that llama.cpp does not compute.

    Raises:
        ModelError: naming them.
    """
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
    if architecture == "gemma3" and rope_of(config, "sliding_attention")["rope_theta"] != LOCAL_ROPE_THETA:
        wrong.append(f"a rope_theta of windowed blocks other than {LOCAL_ROPE_THETA:g}")
    if (scale := getattr(config, "query_pre_attn_scalar", None)) and scale != attention_scalar(config):
        wrong.append(f"query_pre_attn_scalar {scale}")
    if getattr(config, "use_bidirectional_attention", None):
        wrong.append("use_bidirectional_attention")
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "llama3", *SCALINGS):
        wrong.append(f"rope_type {rope['rope_type']}")
    if (share := rope.get("partial_rotary_factor") or 1) != 1:
        wrong.append(f"partial_rotary_factor {share}")
    if rope.get("attention_factor"):
        wrong.append(f"attention_factor {rope['attention_factor']}")
    if wrong:
        raise ModelError(f"llama.cpp does not compute this model's {', '.join(wrong)}; no GGUF file is written")


def as_the_file_says(config, path: Path):
    """Return what transformers read of a GGUF file with the settings that it left out.

    Raises:
        ModelError: the file says something that maps to none.
    """
    header, config = read_header(path), copy.deepcopy(config)
    begin = f"{header.values.get('general.architecture')}."
    said = {key.removeprefix(begin): value for key, value in header.values.items() if key.startswith(begin)}
    said = {key: value for key, value in said.items() if key == SCALING_TYPE or isinstance(value, int | float)}
    refused = [f"{key} {said[key]}" for key, same in REFUSED.items() if said.get(key, same[0]) not in same]
    refused += [key for key in said if key.startswith(SCALING) and key not in KNOWN]
    refused += [name for name in header.tensors if name.startswith("rope_factors_")]
    refused += _take_rope(config, said, _factors(header, path)) + _take_attention(config, said)
    if refused:
        raise ModelError(
            f"{path} says {', '.join(refused)}, for which its model has no setting here; take the model's "
            "safetensors instead of the GGUF file"
        )
    return config


def _factors(header: Header, path: Path) -> torch.Tensor | None:
    place, kind, shape = header.tensors.get(ROPE_FACTORS, (0, _FLOAT32, (0,)))
    if not math.prod(shape) or kind != _FLOAT32:
        return None
    return torch.from_numpy(np.fromfile(path, np.float32, math.prod(shape), offset=place))


def _take_attention(config, said: dict[str, Any]) -> list[str]:
    """Set scales and caps of attention and logits; return what cannot be set."""
    if config.model_type in ARCHITECTURES:
        if hasattr(config, "head_dim") and "attention.key_length" in said:
            config.head_dim = said["attention.key_length"]
        if hasattr(config, "query_pre_attn_scalar"):
            config.query_pre_attn_scalar = attention_scalar(config)
    rotated = said.get(ROTATED, head_size(config)) if config.model_type in ARCHITECTURES else None
    refused = [] if rotated in (None, head_size(config)) else [f"{ROTATED} {rotated}"]
    for cap in CAPS:
        if hasattr(config, cap):
            setattr(config, cap, said.get(cap, getattr(config, cap)))
        elif said.get(cap):
            refused.append(f"{cap} {said[cap]}")
    return refused


def _take_rope(config, said: dict[str, Any], factors: torch.Tensor | None) -> list[str]:
    """Set the rotary scaling; return what cannot be set."""
    kind = said.get(SCALING_TYPE, "linear" if f"{SCALING}factor" in said else "none")
    if not getattr(config, "rope_parameters", None):
        return [f"{SCALING_TYPE} {kind}"] if kind != "none" else []
    local = said.get(LOCAL_THETA)
    if local and local != rope_of(config, "sliding_attention")["rope_theta"]:
        return [f"{LOCAL_THETA} {local}"]
    if factors is not None and rope_of(config)["rope_type"] == "default":
        return _take_factors(config, factors) if kind == "none" else [f"{ROPE_FACTORS} beside a scaling"]
    if kind == "none":
        return []
    if kind not in SCALINGS:
        return [f"{SCALING_TYPE} {kind}"]
    scaling = {name: said[SCALING + key] for name, key in SCALINGS[kind].items() if SCALING + key in said}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    if scaling.setdefault("factor", 1.0) not in (0.0, 1.0):
        _set_rope(config, {"rope_type": kind, **scaling})
    return []


def _set_rope(config, scaling: dict[str, Any]) -> None:
    parameters = config.rope_parameters
    inside = "full_attention" in parameters  # llama.cpp scales no windowed block
    kept = parameters["full_attention"] if inside else parameters
    config.rope_parameters = {**parameters, "full_attention": {**kept, **scaling}} if inside else {**kept, **scaling}


def _take_factors(config, factors: torch.Tensor) -> list[str]:
    if (factors == 1).all():
        return []
    plain, largest = config.rope_parameters, factors.max().item()
    rule = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    first = _FIRST_CONTEXT
    if len(factors) == len(_frequencies(config)) and (between := (factors > 1) & (factors < largest)).any():
        share = (1 / factors.double() - 1 / largest) / (1 - 1 / largest)  # of a frequency left as it is
        turns = rule["low_freq_factor"] + share * (rule["high_freq_factor"] - rule["low_freq_factor"])
        first = round((turns * 2 * math.pi / _frequencies(config))[between].median().item())
    _set_rope(config, rule | {"original_max_position_embeddings": first})
    found = rope_factors(config)
    if found is not None and found.shape == factors.shape and torch.allclose(found, factors, rtol=1e-4, atol=0):
        return []
    config.rope_parameters = plain
    return [ROPE_FACTORS]
