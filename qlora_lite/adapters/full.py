"""Full fine-tuning: all weights of a 16-bit model are trained, and none are added.

Weights stay in the type that the model computes in: bfloat16, rounded stochastically after an update in float32
(``train.rounding``), or float32. There is no float32 master copy of bfloat16 weights, which would take twice their
memory once more.
"""

import logging
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.quant.packed import PackedWeight

from .lora.inject import in_blocks
from .method import AdapterMethod

log = logging.getLogger("qlora_lite")


@dataclass(frozen=True)
class Full(AdapterMethod):
    """Train the model itself. Its weights have their own names in files."""

    trains_base = True
    size_setting = ""

    def apply(self, model: nn.Module) -> None:
        """Let every weight learn.

        Raises:
            ModelError: the model has weights in 4 bit, or in float16.
        """
        if any(isinstance(module, PackedWeight) for module in model.modules()):
            raise ModelError("full fine-tuning trains 16-bit weights, and the model has some in 4 bit: load it with "
                             "model.quant none, from files that are not quantised")  # fmt: skip
        if model.dtype == torch.float16:
            raise ModelError("full fine-tuning has no updates of float16 weights: set model.compute_dtype to bfloat16 "
                             "or float32")  # fmt: skip
        model.requires_grad_(True)

    def config(self, model: nn.Module, base_model: str) -> dict:
        """Return what a checkpoint says of its weights."""
        return {"method": "full", "base_model_name_or_path": base_model}

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all weights, tied ones once: first those outside of blocks, so that a deeper model's begin alike."""
        inside = in_blocks(model)
        named = [(not _lies_in(inside, name), name, parameter) for name, parameter in model.named_parameters()]
        for is_outside in (True, False):
            yield from ((name, parameter) for outside, name, parameter in named if outside == is_outside)

    def trained_base(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield all weights."""
        return model.parameters()

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:  # fmt: skip
        """Return nothing: no two layers are trained differently."""
        return {}

    def check_reached(self, model: nn.Module, norms: Mapping[str, float]) -> None:
        """Warn of weights without gradient: a model may well have some that its first rows do not use."""
        if idle := self.layers_not_reached(model, norms):
            log.warning("%d of %d weights got no gradient in the first step, first %s", len(idle), len(norms), idle[0])


def _lies_in(paths: Container[str], name: str) -> bool:
    """Return whether a weight belongs to one of the modules that ``in_blocks`` gives."""
    path = name.rpartition(".")[0]
    return path in paths or f"{path}." in paths
