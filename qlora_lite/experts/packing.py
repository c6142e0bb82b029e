"""Put the experts of a model's blocks into 4 bits, and compute with them and with LoRA weights beside them.

transformers holds a projection of all experts of a block in one parameter [E, out, in], and lets other packages
compute with it by name (``ExpertsInterface``, its documented extension). Here a ``PackedWeight`` beside it takes the
parameter's place, and the name is ``routed``'s, as it is for experts in 16 bit that have LoRA weights.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from qlora_lite.memory.shapes import device_type, has_triton
from qlora_lite.quant.nf4 import BLOCK_SIZE, quantize
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.quant.product import WeightSpec

from .grouped import Experts
from .routed import routed

NAME, GROUPED = "qlora_lite_experts", "qlora_lite_grouped_experts"
PACKED = "packed_"  # before a parameter's name: what stands for it
LORA = "lora_"  # before it: its LoRA weights

Added = tuple[torch.Tensor, torch.Tensor, float]  # LoRA weights A [E r, in] and B [out, r E], and their scale


class Projection(NamedTuple):
    """One weight of all experts of a block.

    Args:
        path: of the module that holds the experts.
        experts: the module.
        name: of the parameter, [E, out, in] or, where the module says so, [E, in, out].
    """

    path: str
    experts: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The weight in 16 bit."""
        return getattr(self.experts, self.name)

    @property
    def parameter_path(self) -> str:
        """The path of the weight in 16 bit."""
        return f"{self.path}.{self.name}"

    @property
    def packed(self) -> str:
        """The path of what takes its place."""
        return f"{self.path}.{PACKED}{self.name}"

    @property
    def stacking_bytes(self) -> int:
        """What it takes to put the experts of a checkpoint together: transformers stacks them and joins the parts of a
        gated first product (core_model_loading), and ``straight`` makes one more copy."""
        return (3 if self.experts.is_transposed else 2) * self.parameter.nbytes

    def straight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as [E, out, in], whole."""
        return (weight.transpose(1, 2) if self.experts.is_transposed else weight).contiguous()

    @property
    def described(self) -> tuple[WeightSpec, tuple[torch.Tensor, ...]]:
        """The weight, packed or in 16 bit, as spec (of the shape [E, out, in]) and tensors; see ``quant.product``."""
        if (packed := getattr(self.experts, PACKED + self.name, None)) is not None:
            return packed.described
        return WeightSpec(_shape(self), None, self.experts.is_transposed), (self.parameter,)


def projections(model: nn.Module) -> Iterator[Projection]:
    """Yield the weights of experts that ``routed`` can compute with."""
    for path, module in model.named_modules():
        for name in _names(module):
            yield Projection(path, module, name)


def expert_weights(model: nn.Module) -> dict[str, Projection]:
    """Return the weights of experts by path, packed or in 16 bit: those that LoRA may adapt."""
    found: dict[str, Projection] = {}
    for path, module in model.named_modules():
        names = both_names(module) if _is_packed(module) else _names(module)
        found |= {f"{path}.{name}": Projection(path, module, name) for name in names}
    return found


def both_names(experts: nn.Module) -> tuple[str, str]:
    """Return the names of a block's two projections, the first of them first."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _is_packed(module: nn.Module) -> bool:
    """Return whether one of the two projections at least is in 4 bits."""
    return hasattr(module, "has_gate") and any(hasattr(module, PACKED + name) for name in both_names(module))


def _names(module: nn.Module) -> tuple[str, ...]:
    if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
        return ()
    names = both_names(module)
    weights = [getattr(module, name, None) for name in names]
    fitting = all(isinstance(w, nn.Parameter) and w.ndim == 3 and w[0].numel() % BLOCK_SIZE == 0 for w in weights)
    return names if fitting else ()


def put_empty(projection: Projection, quant_type: str, double_quant: bool) -> PackedWeight:
    """Put a packed weight without values on the meta device beside a projection's parameter, and return it."""
    packed = PackedWeight(_shape(projection), quant_type, double_quant, "meta")
    setattr(projection.experts, PACKED + projection.name, packed)
    return packed


def _shape(projection: Projection) -> tuple[int, ...]:
    count, one, other = projection.parameter.shape
    return (count, other, one) if projection.experts.is_transposed else (count, one, other)


def placeholder() -> torch.Tensor:
    """Return what stands for a projection's parameter until it is dropped: to transformers' loader it is then there."""
    return torch.empty(0)


def placeholders(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a placeholder by the name of each parameter that a packed weight has taken the place of."""
    parts = [name.rpartition(".") for name, _ in model.named_modules()]
    return {f"{path}.{leaf.removeprefix(PACKED)}": placeholder() for path, _, leaf in parts if leaf.startswith(PACKED)}


def packs_experts(model: nn.Module) -> bool:
    """Return whether a model, or a skeleton, has experts in 4 bits."""
    return any(map(_is_packed, model.modules()))


def drop_parameter(projection: Projection) -> None:
    """Let go of a projection's parameter, for which a packed weight stands now."""
    delattr(projection.experts, projection.name)


def pack_in_place(model: nn.Module, quant_type: str, double_quant: bool, skip: Container[str] = ()) -> None:
    """Quantise the experts of a model that is in memory, one projection at a time, but for paths to skip."""
    for projection in [each for each in projections(model) if each.parameter_path not in skip]:
        weight = projection.straight(projection.parameter.detach())
        put_empty(projection, quant_type, double_quant).set_packed(quantize(weight, quant_type, double_quant))
        drop_parameter(projection)


def use_experts(model: nn.Module, grouped: bool = False) -> None:
    """Have a model with experts that are packed, or have LoRA weights, compute with them.

    Args:
        grouped: in groups, on a GPU and where a batch uses most of them; see ``grouped``.
    """
    if first_experts(model) is not None:
        ExpertsInterface.register(NAME, compute_experts)
        ExpertsInterface.register(GROUPED, partial(compute_experts, grouped=True))
        model.set_experts_implementation(GROUPED if grouped else NAME)


def compute_experts(
    experts: nn.Module,
    hidden_TD: torch.Tensor,
    chosen_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    grouped: bool = False,
    lora: Mapping[str, Added] | None = None,
) -> torch.Tensor:
    """Compute what transformers' own experts would with the dequantised weights, as its interface asks for it.

    Args:
        lora: see ``described_experts``.
    """
    described, tensors = described_experts(experts, lora)
    can_group = device_type(hidden_TD.device) == "cuda" and has_triton()
    return routed(hidden_TD, chosen_TK, weights_TK, described._replace(grouped=grouped and can_group), tensors)


def first_experts(model: nn.Module) -> nn.Module | None:
    """Return the first module that holds experts which are packed, or have LoRA weights."""
    own = (_is_packed(module) or _adapts(module) for module in model.modules())
    return next((module for module, is_own in zip(model.modules(), own, strict=True) if is_own), None)


def adapts_experts(model: nn.Module) -> bool:
    """Return whether a model, or a skeleton, has LoRA weights beside experts."""
    return any(_adapts(module) for module in model.modules())


def _adapts(module: nn.Module) -> bool:
    return hasattr(module, "has_gate") and bool(_added(module))


def _added(experts: nn.Module) -> dict[str, Added]:
    """Return the LoRA weights beside each projection that has some: A and B, and their scale."""
    layers = {name: getattr(experts, LORA + name, None) for name in both_names(experts)}
    return {name: (layer.lora_A, layer.lora_B, layer.scale) for name, layer in layers.items() if layer is not None}


def described_experts(
    experts: nn.Module, lora: Mapping[str, Added] | None = None
) -> tuple[Experts, Sequence[torch.Tensor]]:
    """Return what a block's experts compute, and their weights, as ``routed`` takes them.

    Args:
        lora: A, B and scale by the name of the projection; None are the module's own.
    """
    names, added = both_names(experts), _added(experts) if lora is None else lora
    (up, tensors_of_up), (down, tensors_of_down) = (Projection("", experts, name).described for name in names)
    biases = [getattr(experts, f"{name}_bias") for name in names] if experts.has_bias else []
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    of_up, of_down = (added[name][2] if name in added else None for name in names)
    described = Experts(activate, up, down, len(tensors_of_up), experts.has_bias, scales=(of_up, of_down))
    factors = [tensor for name in names if name in added for tensor in added[name][:2]]
    return described, [*tensors_of_up, *tensors_of_down, *biases, *factors]
