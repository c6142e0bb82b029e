"""Cut a weight, or a stack of those of experts, into pieces that are dequantised one after the other, so that float32
is there of one piece alone."""

from collections.abc import Callable, Iterator, Sequence

import torch

from qlora_lite.memory.marks import repeated

ROWS_AT_ONCE = 1 << 21  # weights, which take 8 MiB in float32


def by_rows(
    dequantize_rows: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantise a weight [out, in], or all of [E, out, in], some rows at a time, by a format's ``dequantize_rows``."""
    weight = torch.empty(tuple(shape), dtype=dtype, device=tensors[0].device)
    _fill(weight, dequantize_rows, tensors)
    return weight


def _fill(weight: torch.Tensor, dequantize_rows: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    if weight.ndim == 3:
        for one in pieces(len(weight), 1, weight.is_meta):
            _fill(weight[one.start], dequantize_rows, [tensor[one.start] for tensor in tensors])
        return
    for some in pieces(len(weight), max(1, ROWS_AT_ONCE // weight.shape[1]), weight.is_meta):
        weight[some] = dequantize_rows(tensors, weight.shape, some, torch.float32)


def some_of(
    dequantize: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    shape: Sequence[int],
    which: slice | torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dequantise a part of a weight along its first dimension, by a format's ``dequantize``.

    Args:
        tensors: the parts, of the same first dimension as the weight.
    """
    some = [tensor[which].contiguous() for tensor in tensors]
    return dequantize(some, (len(some[0]), *shape[1:]), dtype)


def pieces(length: int, at_once: int, is_meta: bool) -> Iterator[slice]:
    """Yield slices of ``at_once`` of a length; the last may be shorter.

    Args:
        is_meta: it is a plan, in which one piece counts for all of its size: large weights have dozens.
    """
    whole = length // at_once
    if is_meta and whole > 1:
        with repeated(whole):
            yield slice(0, at_once)
        starts = range(whole * at_once, length, at_once)
    else:
        starts = range(0, length, at_once)
    for start in starts:
        yield slice(start, min(start + at_once, length))
