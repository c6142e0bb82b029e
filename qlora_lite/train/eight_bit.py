"""bitsandbytes' 8-bit AdamW and Lion on a CPU, many factors at a time: the same bits in a fraction of the time.

On a CPU bitsandbytes updates one factor after the other, each with some twenty operators on 10,000 values, where
starting an operator costs more than its arithmetic, and packs states value by value. Here factors of whole blocks are
laid end to end, up to ``BATCH_VALUES`` at once, and packed by ``quant.blockwise``. Blocks never reach across factors,
so every bit of weights and states is bitsandbytes' own; so are the states, their names and their types. Other factors,
and a card's, which a plan stands for too, go the ordinary way. Either way ``rounding`` may have the last word.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from qlora_lite.ops.shapes import device_type
from qlora_lite.quant import bnb
from qlora_lite.quant.blockwise import BLOCK_VALUES, nearest_entries, pack_blocks

from .rounding import round_by_chance

BATCH_VALUES = 1 << 18  # float32 copies of 1 MiB: larger ones leave the cache, smaller ones pay more for operators


@cache
def _nearest(number: int) -> Tensor:
    """Return ``nearest_entries`` of the code of a state: the first has signs, the second has none."""
    return nearest_entries(bnb.functional.create_dynamic_map(signed=number == 1))


class _Together:
    """The part that both optimizers share; ``_update`` is each one's own."""

    rounds_by_chance = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for number in (1, 2):
            _nearest(number)  # now: made by the first step of a process, a plan would count them as the step's

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for gindex, group in enumerate(self.param_groups):
            together = []
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.init_state(group, p, gindex, pindex)
                if _has_whole_blocks(p, self.state[p]):
                    together.append((pindex, p))
                else:
                    self.update_step(group, p, gindex, pindex)
            for numbered in _batches(together, self.state):
                places, batch = zip(*numbered, strict=True)
                states = [self.state[p] for p in batch]
                for state in states:
                    state["step"] += 1
                weights = _joined([p.data for p in batch]).float()
                self._update(group, states, weights, _joined([p.grad for p in batch]).float())
                if self.rounds_by_chance and batch[0].dtype == torch.bfloat16:
                    weights = round_by_chance(weights, states[0]["step"], places, [p.numel() for p in batch])
                _put_back(weights, [p.data for p in batch])

    def _unpack(self, states: Sequence[dict], number: int) -> Tensor:
        packed, absmax = (_joined([state[f"{part}{number}"] for state in states]) for part in ("state", "absmax"))
        code = states[0][f"qmap{number}"]
        return torch.ops.bitsandbytes.dequantize_blockwise(packed, absmax, code, BLOCK_VALUES, torch.float32)

    def _pack(self, states: Sequence[dict], number: int, values: Tensor) -> None:
        for part, packed in zip(("state", "absmax"), pack_blocks(values, _nearest(number)), strict=True):
            _put_back(packed, [state[f"{part}{number}"] for state in states])


def _has_whole_blocks(parameter: Tensor, state: dict) -> bool:
    whole = state["state1"].dtype == torch.uint8 and parameter.numel() % BLOCK_VALUES == 0
    return whole and device_type(parameter.device) == "cpu"


def _batches(parameters: Sequence[tuple[int, Tensor]], states: dict) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield neighbours of one type that have been updated as often, up to ``BATCH_VALUES`` or one alone."""
    batch, values, kind = [], 0, None
    for pindex, p in parameters:
        if batch and (kind != (p.dtype, states[p]["step"]) or values + p.numel() > BATCH_VALUES):
            yield batch
            batch, values = [], 0
        batch.append((pindex, p))
        values, kind = values + p.numel(), (p.dtype, states[p]["step"])
    if batch:
        yield batch


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _put_back(joined: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = joined.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


class CpuAdamW8bit(_Together, bnb.optim.AdamW8bit):
    """AdamW with states in 8 bits (decoupled decay, arXiv 1711.05101)."""

    def _update(self, group: dict, states: Sequence[dict], weights: Tensor, gradients: Tensor) -> None:
        (beta1, beta2, *_), rate, step = group["betas"], group["lr"], states[0]["step"]
        mean, square = (self._unpack(states, number) for number in (1, 2))
        mean.mul_(beta1).add_(gradients, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        self._pack(states, 1, mean)
        self._pack(states, 2, square)
        if group["weight_decay"] > 0:
            weights.mul_(1 - rate * group["weight_decay"])
        root = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        weights.addcdiv_(mean, root, value=-rate / (1 - beta1**step))


class CpuLion8bit(_Together, bnb.optim.Lion8bit):
    """Lion with its state in 8 bits (arXiv 2302.06675)."""

    def _update(self, group: dict, states: Sequence[dict], weights: Tensor, gradients: Tensor) -> None:
        (beta1, beta2, *_), rate = group["betas"], group["lr"]
        mean = self._unpack(states, 1)
        if group["weight_decay"] > 0:
            weights.mul_(1 - rate * group["weight_decay"])
        direction = mean.mul(beta1).add_(gradients * (1 - beta1)).sign_()
        weights.add_(direction, alpha=-rate)
        self._pack(states, 1, mean.mul_(beta2).add_(gradients, alpha=1 - beta2))
