"""Which fused kernels a model computes with on a GPU, in place of what this package writes out.

They round otherwise than what they replace, so a model has none until training allows them (``models.memory_options``),
and a run keeps those that were no worse on its own shapes (``train.kernels``).
"""

from collections.abc import Collection
from weakref import WeakKeyDictionary

from torch import nn

from qlora_lite.experts.packing import first_experts, use_experts
from qlora_lite.kernels.fused_loss import installed
from qlora_lite.kernels.gated import GatedMLP
from qlora_lite.kernels.norm import LeanNorm
from qlora_lite.offload.around import wrappers

EXPERTS = "experts"  # packed ones, and those with LoRA weights, in groups, by kernels of our own
FLEX = "flex"  # attention with capped scores or sinks in one call, by a kernel that torch compiles
GATED = "gated"  # products of gated MLPs, by Liger's kernels where it is installed
KERNELS = "norms", "sequences", EXPERTS, FLEX, GATED  # RMS norms both ways; attention to all packed sequences at once
_allowed: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()  # by model


def use_kernels(model: nn.Module, names: Collection[str]) -> None:
    """Have a model compute with some of ``KERNELS``, where they can, and with no others."""
    names = set(names)
    if first_experts(model) is None:
        names -= {EXPERTS}
    if "liger" not in installed():
        names -= {GATED}
    for norm in wrappers(model, LeanNorm):
        norm.fused = "norms" in names
    for mlp in wrappers(model, GatedMLP):
        mlp.fused = GATED in names
    use_experts(model, grouped=EXPERTS in names)
    _allowed[model] = frozenset(names)


def kernels_of(model: nn.Module) -> frozenset[str]:
    """Return which of ``KERNELS`` a model may compute with."""
    return _allowed.get(model, frozenset())
