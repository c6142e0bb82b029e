"""Full fine-tuning: all weights of a 16-bit model are trained, and none are added.

Weights stay in the type that the model computes in: bfloat16, rounded stochastically after an update in float32
(``train.rounding``), or float32. There is no float32 master copy of bfloat16 weights, which would take twice their
memory once more.

With ``switch_every`` one block learns at a time, for so many steps, and then another, in an order that is drawn anew
once all have had their turn; the optimizer begins afresh with each (BAdam, arXiv 2404.02827, algorithm 1). Gradients
and optimizer states are one block's, and backward ends there. Embeddings, head and what else lies outside of blocks
stay as they are.
"""

import logging
import random
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.quant.packed import PackedWeight

from .lora.inject import blocks_of, in_blocks
from .method import AdapterMethod

log = logging.getLogger("qlora_lite")

_SINKS = ".sinks"  # of gpt-oss's attention


@dataclass(frozen=True)
class Full(AdapterMethod):
    """Train the model itself. Its weights have their own names in files.

    ``switch_every``: steps after which another block is trained; 0 trains all weights at all times.
    """

    switch_every: int = 0

    trains_base = True
    size_setting = ""
    why_not_merged = ""

    @property
    def in_turn(self) -> bool:
        """Whether one block at a time is trained."""
        return self.switch_every > 0

    def apply(self, model: nn.Module) -> None:
        """Let every weight learn, but for gpt-oss's sinks, for which kernels here have no gradient.

        Of blocks in turn the first one, whose backward pass is the longest: what it needs is most.

        Raises:
            ModelError: the model has weights in 4 bit, or in float16; or its blocks, in turn, are of unequal sizes.
        """
        if any(isinstance(module, PackedWeight) for module in model.modules()):
            raise ModelError(
                "full fine-tuning trains 16-bit weights, and the model has some in 4 bit: load it with "
                "model.quant none, from files that are not quantised"
            )
        if model.dtype == torch.float16:
            raise ModelError(
                "full fine-tuning has no updates of float16 weights: set model.compute_dtype to bfloat16 or float32"
            )
        _let_learn(model, not self.switch_every)
        if self.switch_every:
            found = list(blocks_of(model).values())
            if not found or len({sum(p.numel() for p in block.parameters()) for block in found}) > 1:
                raise ModelError(
                    "adapter.switch_every is for models whose blocks all have the same number of weights: set it to 0"
                )
            _let_learn(found[0], True)

    def turn_begins(self, step: int) -> int:
        """See ``AdapterMethod``."""
        return (step - 1) // self.switch_every * self.switch_every + 1 if self.switch_every else 1

    def take_turn(self, model: nn.Module, step: int) -> None:
        """Let the block learn whose turn a step is in."""
        found = list(blocks_of(model).values())
        cycle, place = divmod((step - 1) // self.switch_every, len(found))
        chosen = found[random.Random(cycle).sample(range(len(found)), len(found))[place]]
        for block in found:
            _let_learn(block, block is chosen)

    def config(self, model: nn.Module, base_model: str) -> dict:
        """Return what a checkpoint says of its weights."""
        return {"method": "full", "base_model_name_or_path": base_model}

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained at present, as ``_all`` does."""
        return ((name, parameter) for name, parameter in self._all(model) if parameter.requires_grad)

    def _all(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all that is trained in a run, tied weights once: first those outside of blocks, so that a deeper
        model's begin alike."""
        inside = in_blocks(model)
        named = [(not _lies_in(inside, name), name, parameter) for name, parameter in model.named_parameters()]
        for is_outside in (False,) if self.switch_every else (True, False):
            yield from ((name, parameter) for outside, name, parameter in named if outside == is_outside)

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return all that is trained in a run, whoever's turn it is."""
        return {name: parameter.detach() for name, parameter in self._all(model)}

    def trained_base(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Yield all that is trained in a run."""
        return (parameter for _, parameter in self._all(model))

    def layer_kinds(
        self, linear: Sequence[str], experts: Sequence[str], in_blocks: Container[str]
    ) -> Mapping[str, Hashable]:
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


def _let_learn(module: nn.Module, learns: bool) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns and not f".{name}".endswith(_SINKS))
