"""Where a causal language model keeps its parts: decoder and head.

Everything is asked of transformers' own interface (``base_model_prefix``, ``get_output_embeddings``) and never of
architecture names, so that a new architecture needs no change here. What the head does to its logits (scale, soft
cap) is read from the configuration, and ``train.guards`` compares the result with the model's own logits before
training.
"""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.errors import ModelError
from qlora_lite.ops.kept import keep_results
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
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def set_checkpointing(model: nn.Module, enabled: bool, kept_blocks: int = 0) -> None:
    """Recompute every block in backward (but for the results that ``ops.kept`` keeps), or keep its activations.

    transformers before 5.24 names the same methods ``gradient_checkpointing_*``; drop those at a newer minimum.

    Args:
        kept_blocks: of the last blocks, how many keep their activations although ``enabled``. The last ones are
            free again before the first block is computed a second time, so that the two never add up.
    """
    verb = "enable" if enabled else "disable"
    newer = getattr(model, f"activation_checkpointing_{verb}", None)
    switch = newer or getattr(model, f"gradient_checkpointing_{verb}")
    if not enabled:
        switch()
        return
    switch({"use_reentrant": False, "context_fn": keep_results})
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks[len(blocks) - min(kept_blocks, len(blocks)) :]:
        block.gradient_checkpointing = False
