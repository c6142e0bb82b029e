"""Write an adapter of several ranks and scales with one, for readers that know only one.

The adapted weight is W + s_i B_i A_i with a scale of its own for each layer. A reader that takes one alpha for all
computes alpha / r_i (or, with one rank R, alpha / R). So the commonest alpha is kept, B_i is multiplied by what is
missing, and factors of a smaller rank get rows and columns of zeros, which add nothing. Layers that have the common
scale already keep their bits; the others are written in float32 where the product is not exact in their own type.

Shapes: A [r, in], B [out, r]; R the common rank.
"""

import math

import torch
from torch.nn import functional

from qlora_lite.adapters.read import Adapter, Factors


def with_one_alpha(adapter: Adapter, rank: int | None = None) -> Adapter:
    """Return an equal adapter whose layers share one alpha and plain scales (alpha / r).

    Args:
        adapter: any; it is left as it is.
        rank: the rank that every layer gets, at least the largest; None leaves each its own.
    """
    alphas = {name: factors.scale * (rank or factors.rank) for name, factors in adapter.layers.items()}
    values = list(alphas.values())
    alpha = max(values, key=values.count)
    gains = {name: value / alpha for name, value in alphas.items()}
    dtype = next(iter(adapter.layers.values())).lora_A.dtype
    if not all(_is_exact(gain) for gain in gains.values()):
        dtype = torch.float32
    layers = {
        name: _folded(factors, alpha, gains[name], rank or factors.rank, dtype)
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.dropout)


def _is_exact(gain: float) -> bool:
    """Tell whether multiplying by a number only moves the exponent."""
    return abs(math.frexp(gain)[0]) == 0.5


def _folded(factors: Factors, alpha: float, gain: float, rank: int, dtype: torch.dtype) -> Factors:
    missing = rank - factors.rank
    lora_a = functional.pad(factors.lora_A, (0, 0, 0, missing)).to(dtype).contiguous()
    lora_b = functional.pad((factors.lora_B.float() * gain).to(dtype), (0, missing)).contiguous()
    return Factors(lora_a, lora_b, alpha)
