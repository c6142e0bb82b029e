"""Linear layers that peft takes for the fused experts beside them, by the last parts of their names.

With transformers 5, which has one weight for all experts of a block, peft still loads adapters of the time when each
expert had layers of its own (``peft/utils/transformers_weight_conversion.py``). In the families that this was the form
of, it takes every target that ends in ``gate_proj``, ``up_proj`` or ``down_proj`` out of ``target_modules``, be it a
name, a whole path or matched by a regular expression, and adapts the experts instead. Layers of shared experts, of
dense blocks and of attention gates end alike, and would be left without their LoRA weights, over which peft only warns.

What ``target_parameters`` names is left as it is. So files name such a layer by its weight there: peft gives it the
same LoRA weights under the same names. Beside weights in 16 bit it has neither dropout nor DoRA for them.
"""

from collections.abc import Iterable

from torch import nn
from transformers import conversion_mapping

FAMILY = "qwen2_moe"  # as transformers calls the form of files that these models had
TAKEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of the names of linear layers that peft would take for experts of a model."""
    # peft reads this very table, which has no public name
    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if families.get(model_type) != FAMILY:
        return set()
    return {name for name in names if name.rpartition(".")[2] in TAKEN}


def why_no_dora(model: nn.Module, names: Iterable[str]) -> str:
    """Return why peft does not load DoRA of linear layers by these names, and what to do; "" if it does."""
    if not (taken := taken_for_experts(model, names)):
        return ""
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in taken}))
    return (
        f"peft takes {leaves} of {model.config.model_type} for experts, and named by their weights it has no DoRA "
        "for them in 16 bit: leave them out of lora.targets, set adapter.method to lora, or merge"
    )
