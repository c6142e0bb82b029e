"""Keep small updates of bfloat16 factors: update in float32, and round by chance.

A bfloat16 number has 8 bits of precision. Rounded to the nearest, a weight never feels an update below 1/512 of
itself, however often it comes. Here the updated float32 weight is rounded to the lower or the upper neighbour, with
chances that make it right on average. A factor is in float32 for its own update only; with torch's AdamW, which
updates all in one call, all of them are at the same time.

The chances are a function of the factor's place and of how often it was updated: nothing is left in a generator's
state, so a resumed run, and one whose factors are updated in another order, rounds the same way.

Source: stochastic rounding, arXiv 1502.02551; for weights in bfloat16, arXiv 2010.06192.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from qlora_lite.memory.marks import repeated

_DROPPED_BITS = 16  # of a float32's, for a bfloat16
_PLACES = 65_537  # seeds of one step; a CPU's generator takes 32 bits of a seed


def round_by_chance(values: Tensor, step: int, places: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return values that bfloat16 can hold: each one of its two neighbours there, on average itself.

    Args:
        values: float32 [sum of counts], of several factors end to end.
        step: how often the factors have been updated.
        places: a number of each factor.
        counts: values of each.
    """
    found = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    generator = None if values.is_meta else _generator(values.device)
    for part, place in zip(found.view(-1).split(list(counts)), places, strict=True):
        if generator is not None:
            generator.manual_seed(step * _PLACES + place)
        part.random_(0, 1 << _DROPPED_BITS, generator=generator)
    # the larger the dropped bits, the more often the noise carries into those that stay
    return found.add_(values.view(torch.int32)).bitwise_and_(-1 << _DROPPED_BITS).view(torch.float32)


@cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


@contextmanager
def in_float32(parameters: Mapping[int, torch.nn.Parameter], step_of: Callable[[Tensor], int]) -> Iterator[None]:
    """Let bfloat16 parameters and their gradients be float32, and round what becomes of them by chance.

    Args:
        parameters: by their place; those of other types, or without a gradient, stay as they are.
        step_of: how often a parameter has been updated, asked at the end.
    """
    stored = []
    for place, p in parameters.items():
        if p.dtype == torch.bfloat16 and p.grad is not None:
            data, grad = p.data, p.grad
            stored.append((place, p, data, grad))
            _set(p, data.float(), grad.float())
    try:
        yield
        for place, p, data, _ in stored:
            data.copy_(round_by_chance(p, step_of(p), [place], [p.numel()]))
    finally:
        for _, p, data, grad in stored:
            _set(p, data, grad)


def _set(parameter: torch.nn.Parameter, data: Tensor, grad: Tensor) -> None:
    parameter.grad = None  # it must always have the parameter's type
    parameter.data = data
    parameter.grad = grad


def of_its_shape(parameter: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the parameters with a gradient and the shape of one of them."""
    return (p for p in parameters if p.shape == parameter.shape and p.grad is not None)


class _OneByOne:
    """A bitsandbytes optimizer's update of a single parameter."""

    rounds_by_chance = True

    def update_step(self, group: dict, p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """Update a parameter; in a plan, one of each shape, as often as there are."""
        alike = iter(of_its_shape(p, group["params"]) if p.is_meta else [p])
        if next(alike) is p:
            with repeated(1 + sum(1 for _ in alike)), in_float32({pindex: p}, lambda p: self.state[p]["step"]):
                super().update_step(group, p, gindex, pindex)


@cache
def rounding_by_chance(optimizer_class: type) -> type:
    """Return a bitsandbytes optimizer that updates bfloat16 parameters in float32 and rounds them by chance."""
    return type(optimizer_class.__name__, (_OneByOne, optimizer_class), {})


class RoundingAdamW(torch.optim.AdamW):
    """torch's AdamW, with float32 states for bfloat16 parameters, which are rounded by chance."""

    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        parameters = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        with in_float32(parameters, lambda p: int(self.state[p]["step"])):
            super().step(closure)
