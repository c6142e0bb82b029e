"""Keep small updates of bfloat16 factors: update in float32, and round stochastically.

A bfloat16 number has 8 bits of precision. Rounded to the nearest, a weight never feels an update below 1/512 of
itself, however often it comes. Here the updated float32 weight is rounded to the lower or the upper neighbour, with
chances that make it right on average. Factors are in float32 for their own update only; with torch's AdamW, which
updates all in one call, all of them are at the same time.

The chances of what is rounded at once are a function of its first factor's place and of how often that was updated:
nothing is left in a generator's state, so a resumed run rounds the same way. What ranks have divided they round each by
chances of its own, which no other rank has, so that these depend on how many ranks there are.

Source: stochastic rounding, arXiv 1502.02551; for weights in bfloat16, arXiv 2010.06192.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .divided_weights import Parts

_DROPPED_BITS = 16  # of a float32's, for a bfloat16
_PLACES = 65_537  # seeds of one step; a CPU's generator takes 32 bits of a seed


def round_stochastically(values: Tensor, step: int, place: int) -> Tensor:
    """Return each value as one of its two neighbours in bfloat16, on average itself: a view of the values' memory.

    Args:
        values: float32, contiguous; changed.
        step: how often they have been updated.
        place: a number of theirs.
    """
    noise = torch.empty_like(values, dtype=torch.int32)
    generator = None if values.is_meta else _generator(values.device).manual_seed(step * _PLACES + place)
    # the larger the dropped bits, the more often the noise carries into those that stay
    values.view(torch.int32).add_(noise.random_(0, 1 << _DROPPED_BITS, generator=generator))
    return values.view(torch.bfloat16)[..., 1::2]  # the upper half of each float32, which every torch has last


def places_of(parameters: Sequence[Tensor], counts: Sequence[int], parts: Parts) -> dict[Tensor, int]:
    """Return each parameter's first place: those of whole weights alike on all ranks, those of parts on one alone.

    Args:
        counts: how many places each has.
    """
    is_part = [p in parts.values for p in parameters]
    whole = sum(count for count, divided in zip(counts, is_part, strict=True) if not divided)
    begins = {False: 0, True: whole + parts.rank * ((_PLACES - whole) // parts.count)}
    places = {}
    for p, count, divided in zip(parameters, counts, is_part, strict=True):
        places[p] = begins[divided]
        begins[divided] += count
    return places


@cache
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


@contextmanager
def in_float32(parameters: Mapping[int, torch.nn.Parameter], step_of: Callable[[Tensor], int]) -> Iterator[None]:
    """Let bfloat16 parameters and their gradients be float32, and round what becomes of them stochastically.

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
            data.copy_(round_stochastically(p.data, step_of(p), place))
    finally:
        for _, p, data, grad in stored:
            _set(p, data, grad)


def _set(parameter: torch.nn.Parameter, data: Tensor, grad: Tensor) -> None:
    parameter.grad = None  # it must always have the parameter's type
    parameter.data = data
    parameter.grad = grad
