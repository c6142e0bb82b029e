"""Put the experts of a model's blocks into 4 bits.

transformers holds a projection of all experts of a block in one parameter [E, out, in], and lets other packages
compute with it by name (``ExpertsInterface``, its documented extension). Here a ``PackedWeight`` beside it takes the
parameter's place, and the name is ``routed``'s. The weights stay frozen: LoRA weights are for linear layers, such as
those of attention and of experts that all tokens share.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from qlora_lite.ops.shapes import device_type, has_triton
from qlora_lite.quant.nf4 import BLOCK_SIZE, quantize
from qlora_lite.quant.packed import PackedWeight

from .grouped import Experts
from .routed import routed

NAME, GROUPED = "qlora_lite_experts", "qlora_lite_grouped_experts"
PACKED = "packed_"  # before a parameter's name: what stands for it


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


def projections(model: nn.Module) -> Iterator[Projection]:
    """Yield the weights of experts that ``routed`` can compute with."""
    for path, module in model.named_modules():
        for name in _names(module):
            yield Projection(path, module, name)


def _names(module: nn.Module) -> tuple[str, ...]:
    if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
        return ()
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
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
    return first_experts(model) is not None


def drop_parameter(projection: Projection) -> None:
    """Let go of a projection's parameter, for which a packed weight stands now."""
    delattr(projection.experts, projection.name)


def pack_in_place(model: nn.Module, quant_type: str, double_quant: bool) -> None:
    """Quantise the experts of a model that is in memory, one projection at a time."""
    for projection in list(projections(model)):
        weight = projection.straight(projection.parameter.detach())
        put_empty(projection, quant_type, double_quant).set_packed(quantize(weight, quant_type, double_quant))
        drop_parameter(projection)


def use_packed_experts(model: nn.Module, grouped: bool = False) -> None:
    """Have a model with packed experts compute with them.

    Args:
        grouped: in groups, on a GPU and where a batch uses most of them; see ``grouped``.
    """
    if packs_experts(model):
        ExpertsInterface.register(NAME, packed_experts)
        ExpertsInterface.register(GROUPED, partial(packed_experts, grouped=True))
        model.set_experts_implementation(GROUPED if grouped else NAME)


def packed_experts(
    experts: nn.Module, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor,
    grouped: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Compute what transformers' own experts would with the dequantised weights, as its interface asks for it."""
    described, tensors = described_experts(experts)
    can_group = device_type(hidden_TD.device) == "cuda" and has_triton()
    return routed(hidden_TD, chosen_TK, weights_TK, described._replace(grouped=grouped and can_group), tensors)


def first_experts(model: nn.Module) -> nn.Module | None:
    """Return the first module that holds packed experts."""
    return next((module for module in model.modules() if hasattr(module, f"{PACKED}down_proj")), None)


def described_experts(experts: nn.Module) -> tuple[Experts, Sequence[torch.Tensor]]:
    """Return what a block's packed experts compute, and their weights, as ``routed`` takes them."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    (up, tensors_of_up), (down, tensors_of_down) = (
        getattr(experts, PACKED + name).described for name in (first, "down_proj")
    )
    biases = [getattr(experts, f"{name}_bias") for name in (first, "down_proj")] if experts.has_bias else []
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    described = Experts(activate, up, down, len(tensors_of_up), experts.has_bias)
    return described, [*tensors_of_up, *tensors_of_down, *biases]
