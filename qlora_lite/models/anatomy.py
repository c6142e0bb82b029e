"""Where a causal language model keeps its parts: decoder and head.

Everything is asked of transformers' own interface (``base_model_prefix``, ``get_output_embeddings``) and never of
architecture names, so that a new architecture needs no change here. What the head does to its logits (scale, soft
cap) is read from the configuration, and ``train.guards`` compares the result with the model's own logits before
training.
"""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.errors import ModelError
from qlora_lite.ops.checkpoint import Checkpoint
from qlora_lite.ops.loss import Head


def text_config(model: nn.Module):
    """Return the configuration of the language model (some multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def decoder(model: nn.Module) -> nn.Module:
    """Return the part of the model between token ids and last hidden state.

    Raises:
        ModelError: the model has no such part.
    """
    inner = getattr(model, model.base_model_prefix, None)
    if inner is None or inner is model or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} is not a causal language model with a separate head")
    return inner


def head(model: nn.Module) -> Head:
    """Describe the model's output head, with the scale and soft cap that its configuration states."""
    layer, config = model.get_output_embeddings(), text_config(model)
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's repeated blocks, in order.

    Raises:
        ModelError: the architecture does not mark them as transformers' ``GradientCheckpointingLayer``.
    """
    found = [module for module in decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ModelError(f"{type(model).__name__} does not mark its blocks; it cannot be checkpointed")
    return found


def set_checkpointing(model: nn.Module, enabled: bool, kept_blocks: int = 0) -> None:
    """Compute every block again in backward, or keep its activations.

    Args:
        kept_blocks: of the last blocks, how many keep their activations although ``enabled``. The last ones are
            free again before the first block is computed a second time, so that the two never add up.
    """
    found = blocks(model)
    for number, block in enumerate(found):
        block.gradient_checkpointing = enabled and number < len(found) - kept_blocks
        block._gradient_checkpointing_func = Checkpoint()  # the place that transformers' class documents for it
