"""Build a model that has shapes and no values, to plan a run before anything is downloaded.

The modules are the ones that loading would give: transformers' own, its block linears replaced by
``QuantLinear``. Tensors are fake (``torch._subclasses.fake_tensor``): each knows its size and owns a storage,
none has memory behind it.
"""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_lite.errors import ModelError

from .load import use_row_attention
from .quantizer import replace_linears


def shallow_config(config, layers: int):
    """Return a copy of a model's configuration with fewer blocks."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def block_pattern(config) -> int:
    """Return after how many blocks the kinds of block repeat: 1 for equal blocks, 6 for Gemma-3's."""
    kinds = list(getattr(config, "layer_types", None) or [""])
    return next(n for n in range(1, len(kinds) + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)])


def meta_model(config, quant: str, double_quant: bool, dtype: torch.dtype) -> nn.Module:
    """Build a frozen model on the meta device, its linears as loading would leave them.

    Args:
        config: transformers configuration of a causal language model.
        quant: ``nf4``, ``fp4`` or ``none``.

    Raises:
        ModelError: transformers has no causal language model for the configuration.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"no causal language model can be built from this configuration: {reason}") from error
    if quant != "none":
        head = model.get_output_embeddings()
        replace_linears(model, quant, double_quant, [name for name, m in model.named_modules() if m is head])
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    use_row_attention(model)
    return model


def give_storage(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Replace meta tensors by new, unfilled ones in place; under a fake-tensor mode these take no memory."""
    replaced: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:  # tied weights stay tied
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    replaced[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
                registry[name] = replaced[id(tensor)]
    return model
