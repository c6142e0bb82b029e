"""Which linear layers and weights of experts stay in 16 bit in a model whose others are in 4 bit: ``model.keep_16bit``.

Patterns are those of ``lora.targets``. A checkpoint that is packed already leaves out what its configuration says, and
nothing can be added to that.
"""

from collections.abc import Iterable, Sequence

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_lite.adapters.lora.inject import Target, choose_layers, in_blocks, linear_layers, matching, sharing_layers
from qlora_lite.adapters.parts import has_vision_tower
from qlora_lite.errors import ModelError
from qlora_lite.experts.packing import expert_weights

from .nested import without_weights
from .published import published_formats


def kept_layers(model: nn.Module, patterns: Sequence[str], config=None) -> set[str]:
    """Return the paths of the linear layers and weights of experts that stay in 16 bit: those of patterns, those that
    share a weight, and what is between a vision tower and a language model, which is small.

    Args:
        model: in 16 bit; a skeleton is enough, and one with fewer blocks than the patterns name.
        patterns: names and glob patterns; those that match nothing are passed over.
        config: of the model; None where it is no packed checkpoint.
    """
    layers, experts = linear_layers(model), expert_weights(model)
    found = matching(layers, experts, [Target(pattern) for pattern in patterns], in_blocks(model))
    kept = {name for name, numbers in found.items() if numbers} | left_out((*layers, *experts), config)
    kept |= sharing_layers(model)  # which transformers leaves as they are
    return kept | (layers.keys() - in_blocks(model)) if has_vision_tower(model) else kept


def left_out(layers: Iterable[str], config) -> set[str]:
    """Return those of the layers, and weights of experts, that a packed checkpoint has in 16 bit, as its configuration
    says."""
    if packed := dict(published_formats(config)):
        return {*layers} - packed.keys()
    stored = getattr(config, "quantization_config", None)
    skipped = stored.get("llm_int8_skip_modules") if isinstance(stored, dict) else None
    return {name for name in layers if not should_convert_module(name, skipped)} if skipped else set()


def check_kept(config, patterns: Sequence[str], name: str) -> None:
    """Check that patterns name layers of a model, leave others packed, and fit what a packed checkpoint holds.

    Args:
        config: of the model.
        name: of the model.

    Raises:
        ModelError: one of these is not so.
    """
    if not patterns:
        return
    model = without_weights(config)
    layers, experts = linear_layers(model), expert_weights(model)
    targets, setting = [Target(pattern) for pattern in patterns], "model.keep_16bit"
    kept = choose_layers(layers, experts, targets, in_blocks(model), setting)
    if hasattr(config, "quantization_config"):
        if missing := sorted(kept.keys() - left_out((*layers, *experts), config)):
            raise ModelError(
                f"{setting}: {name} is published with {len(missing)} of these layers packed, such as "
                f"{missing[0]}: leave them out, or use the 16-bit model"
            )
    elif not (layers.keys() & in_blocks(model) | experts.keys()) - kept.keys():
        raise ModelError(f"{setting} leaves no layer in 4 bit: that is model.quant none")
