"""Which fused kernels a model computes with on a card, in place of what this package writes out.

They round otherwise than what they replace, so a model has none until training allows them (``models.levers``), and a
run keeps those that were no worse on its own shapes (``train.kernels``).
"""

from collections.abc import Collection

from torch import nn

from qlora_lite.ops.norm import lean_norms

from .experts import packs_experts, use_packed_experts

EXPERTS = "experts"  # packed ones in groups, by a kernel of our own
FLEX = "flex"  # attention with capped scores or sinks in one call, by a kernel that torch compiles
KERNELS = "norms", "sequences", EXPERTS, FLEX  # of RMS norms both ways; of attention, all packed sequences in one call
COMPILED = frozenset({EXPERTS, FLEX})  # when they are first used: never before they were tried


def use_kernels(model: nn.Module, names: Collection[str]) -> None:
    """Have a model compute with some of ``KERNELS``, where they can, and with no others."""
    for norm in lean_norms(model):
        norm.fused = "norms" in names
    if not packs_experts(model):
        names = set(names) - {EXPERTS}
    use_packed_experts(model, grouped=EXPERTS in names)
    model.qlora_lite_kernels = frozenset(names)


def kernels_of(model: nn.Module) -> frozenset[str]:
    """Return which of ``KERNELS`` a model may compute with."""
    return getattr(model, "qlora_lite_kernels", frozenset())
