"""Where a causal language model keeps its parts: decoder and head.

Everything is asked of transformers' own interface (``base_model_prefix``, ``get_output_embeddings``) and never of
architecture names, so that a new architecture needs no change here. What the head does to its logits (scale, soft
cap) is read from the configuration, and ``train.text_guards`` compares the result with the model's own logits
before training.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.adapters.lora.switch import SwitchModule
from qlora_lite.adapters.parts import NormInFloat32, base_path, has_vision_tower, is_headed
from qlora_lite.errors import ModelError
from qlora_lite.kernels.loss import Head
from qlora_lite.kernels.token_rows import HeadWithRows, RowsOver
from qlora_lite.quant.linear import QuantLinear, WeightRows, is_linear

from .host_tables import HostHead


def text_config(model: nn.Module):
    """Return the configuration of the language model (some multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def decoder(model: nn.Module) -> nn.Module:
    """Return the part of the model between token ids and last hidden state.

    Raises:
        ModelError: the model has no such part.
    """
    inner = model.get_decoder() if has_vision_tower(model) else getattr(model, base_path(model), None)
    if inner is None or inner is model or (model.get_output_embeddings() is None and not is_headed(model)):
        raise ModelError(f"{type(model).__name__} is not a causal language model with a separate head")
    return inner


def vocabulary_size(model: nn.Module) -> int:
    """Return for how many tokens a model has embeddings, with those of tokens behind the table's end."""
    embedding = model.get_input_embeddings()
    return max(embedding.weight.shape[0], 1 + max(getattr(embedding, "tokens", ()), default=-1))


def position_limit(model: nn.Module) -> int | None:
    """Return the tokens of the longest row that a table of positions has room for (GPT-2, OPT, BERT); None without one.

    OPT's has two rows more, and RoBERTa's counts from behind the position of the padding token.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is None:
        return None
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings())
    found = next((table for table in tables if 0 <= table.num_embeddings - limit <= 2), None)
    return None if found is None else limit - _first_position(found)


def first_position(model: nn.Module) -> int:
    """Return the position of a row's first token: 0, but in RoBERTa and its kin that behind the padding token's."""
    tables = (m for name, m in model.named_modules() if name.endswith(".position_embeddings"))
    return max(map(_first_position, tables), default=0)


def _first_position(table: nn.Module) -> int:
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def head(model: nn.Module) -> Head:
    """Describe the model's output head, with the scale and soft cap that its configuration states.

    Raises:
        ModelError: rows use heads of several adapters.
    """
    layer, config = model.get_output_embeddings(), text_config(model)
    with_rows, layer = _without_rows(layer.in_use if isinstance(layer, SwitchModule) else layer)
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    weight: Any
    if isinstance(layer, QuantLinear):
        weight = WeightRows(layer, model.dtype)
    else:
        weight = layer.rows if isinstance(layer, HostHead) else layer.weight
    if with_rows is not None:
        weight = RowsOver(weight, with_rows.tokens, with_rows.token_rows, with_rows.token_ids)
    return Head(weight, getattr(layer, "bias", None), scale, softcap)


def _without_rows(layer: nn.Module) -> tuple[HeadWithRows | None, nn.Module]:
    """Return a head's rows of single tokens, if it has some, and the head itself."""
    return (layer, layer.inner) if isinstance(layer, HeadWithRows) else (None, layer)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's repeated blocks, in order.

    Raises:
        ModelError: the architecture does not mark them as transformers' ``GradientCheckpointingLayer``.
    """
    found = [module for module in decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ModelError(f"{type(model).__name__} does not mark its blocks; it cannot be checkpointed")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model computes on (its first parameter may lie in host memory)."""
    _, layer = _without_rows(model.get_output_embeddings())
    if layer is None:  # a head for sequence classification, which comes last and never leaves the device
        return list(model.parameters())[-1].device
    return layer.device if isinstance(layer, HostHead) else layer.weight.device


def tokenwise_parts(module: nn.Module) -> list[str]:
    """Return the names of a block's or decoder's direct parts that make one tensor of one, token by token: MLPs, norms.

    transformers has no other mark for them than their class's name; ``train.text_guards.check_forward`` compares the
    result of running them in tiles with the model's own logits. Left out are those that take more than one tensor
    (Bloom's and MPT's MLPs add the residual themselves) and MLPs without a linear layer (GPT-OSS's is a router with
    experts, and gives the router's scores too).
    """
    return [name for name, part in module.named_children() if _is_tokenwise(part)]


def _is_tokenwise(part: nn.Module) -> bool:
    part = part.inner if isinstance(part, NormInFloat32) else part
    kind = type(part).__name__
    named_so = "Norm" in kind or (kind.endswith("MLP") and any(map(is_linear, part.modules())))
    return named_so and len(inspect.signature(part.forward).parameters) == 1
