"""bitsandbytes' 8-bit AdamW and Lion on a CPU: the same bits in a fraction of the time.

On a CPU bitsandbytes packs states value by value; here ``quant.blockwise`` does. The states, their names and their
types are bitsandbytes' own. 32-bit states, and a GPU's, which a plan stands for too, are updated by bitsandbytes.
"""

import math
from functools import cache

import torch
from torch import Tensor

from qlora_lite.memory.shapes import device_type
from qlora_lite.quant import bnb
from qlora_lite.quant.blockwise import BLOCK_VALUES, nearest_entries, pack_blocks


@cache
def _nearest(number: int) -> Tensor:
    """Return ``nearest_entries`` of the code of a state: the first has signs, the second has none."""
    return nearest_entries(bnb.functional.create_dynamic_map(signed=number == 1))


class _OnCpu(bnb.optim.optimizer.Optimizer8bit):
    """The part that both optimizers share; ``_compute`` is each one's own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for number in (1, 2):
            _nearest(number)  # now: made by the first step of a process, a plan would count them as the step's

    def update_step(self, group: dict, p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """Update a parameter with its gradient."""
        state = self.state[p]
        if state["state1"].dtype != torch.uint8 or device_type(p.device) != "cpu":
            super().update_step(group, p, gindex, pindex)
            return
        state["step"] += 1
        weights = p.data.float()
        self._compute(group, state, weights, p.grad.float())
        if weights.dtype != p.dtype:
            p.data.copy_(weights)


def _dequantize(state: dict, number: int) -> Tensor:
    packed, absmax, code = (state[f"{part}{number}"] for part in ("state", "absmax", "qmap"))
    return torch.ops.bitsandbytes.dequantize_blockwise(packed, absmax, code, BLOCK_VALUES, torch.float32)


def _pack(state: dict, number: int, values: Tensor) -> None:
    for part, packed in zip(("state", "absmax"), pack_blocks(values, _nearest(number)), strict=True):
        state[f"{part}{number}"].copy_(packed)


class CpuAdamW8bit(_OnCpu, bnb.optim.AdamW8bit):
    """AdamW with states in 8 bits (decoupled decay, arXiv 1711.05101)."""

    def _compute(self, group: dict, state: dict, weights: Tensor, gradients: Tensor) -> None:
        (beta1, beta2, *_), rate, step = group["betas"], group["lr"], state["step"]
        mean, square = _dequantize(state, 1), _dequantize(state, 2)
        mean.mul_(beta1).add_(gradients, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        _pack(state, 1, mean)
        _pack(state, 2, square)
        if group["weight_decay"] > 0:
            weights.mul_(1 - rate * group["weight_decay"])
        root = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        weights.addcdiv_(mean, root, value=-rate / (1 - beta1**step))


class CpuLion8bit(_OnCpu, bnb.optim.Lion8bit):
    """Lion with its state in 8 bits (arXiv 2302.06675)."""

    def _compute(self, group: dict, state: dict, weights: Tensor, gradients: Tensor) -> None:
        (beta1, beta2, *_), rate = group["betas"], group["lr"]
        mean = _dequantize(state, 1)
        if group["weight_decay"] > 0:
            weights.mul_(1 - rate * group["weight_decay"])
        direction = mean.mul(beta1).add_(gradients * (1 - beta1)).sign_()
        weights.add_(direction, alpha=-rate)
        _pack(state, 1, mean.mul_(beta2).add_(gradients, alpha=1 - beta2))
