"""An encoder's attention over packed sequences: each token sees all of its own sequence, or those near it.

Sequences of one length (on a CPU, of one length for its kernels) are attended to in one call, as a batch: those of a
classified text are short, and a call for each would take more than it computes; so are windows of a picture, most of
which have one size. Those that follow one another are taken out as one. What fills a sequence up to the kernel's length
are tokens of the next one, hidden by a mask, and their own results are dropped.

In a window (ModernBERT's local layers) a token sees so many minus one before it, and as many behind it.

Shapes: query, key and value [1, H, T, D], result [1, T, H, D]; a group of n sequences of L tokens [n, H, L, D].
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from qlora_lite.memory.shapes import kernel_rows
from qlora_lite.offload.transfer import sent

from .fused_attention import fused_attention


def encoder_attention(
    query,
    key,
    value,
    row_lengths: Sequence[int],
    scaling: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend within each of the packed sequences; tokens behind the last one get zeros.

    Args:
        row_lengths: tokens of each; of a batch of more than one, the one length of all.
        scaling: factor on the scores; None means 1 / sqrt(D).
        window: a token sees itself, this many minus one before it, and as many behind it; None for all.
    """
    if query.shape[0] > 1:
        mask = _mask([query.shape[2]], query.shape[2], window, query)
        return fused_attention(query, key, value, mask, scaling, dropout, False).transpose(1, 2).contiguous()
    groups: dict[int, list[_Run]] = defaultdict(list)  # by the tokens of a sequence in a call
    start = 0
    for length, alike in groupby(row_lengths):
        count, size = len([*alike]), kernel_rows(length, query.device)
        together = count if size == length else 1
        groups[size] += [_Run(start + number * length, length, together) for number in range(0, count, together)]
        start += count * length
    outs = {}
    for size, runs in groups.items():
        q, k, v = (_gathered(tensor, runs, size) for tensor in (query, key, value))
        lengths = [run.length for run in runs for _ in range(run.sequences)]
        out = fused_attention(q, k, v, _mask(lengths, size, window, query), scaling, dropout, False).transpose(1, 2)
        for run, part in zip(runs, out.split([run.sequences for run in runs]), strict=True):
            outs[run.start] = part[:, : run.length].flatten(0, 1)
    if behind := query.shape[2] - start:
        outs[start] = query.new_zeros(behind, *query.shape[1::2])
    return torch.cat([outs[first] for first in sorted(outs)])[None]


class _Run(NamedTuple):
    """Sequences of one length that follow one another: where the first begins, the tokens of each, how many."""

    start: int
    length: int
    sequences: int


def _gathered(tensor: torch.Tensor, runs: Sequence[_Run], size: int) -> torch.Tensor:
    """Return so many tokens from each start of [1, H, T, D] as a batch, with zeros where there are none left."""
    ends = [run.start + run.sequences * size for run in runs]
    if ends[-1] > tensor.shape[2]:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, ends[-1] - tensor.shape[2]))
    found = [tensor[:, :, run.start : end] for run, end in zip(runs, ends, strict=True)]
    return torch.cat([each.unflatten(2, (-1, size)).squeeze(0).transpose(0, 1) for each in found])


def _mask(lengths: Sequence[int], size: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return what is seen, additive and of a query's type, [n, 1, L, L] or [n, 1, 1, L]; None where that is all."""
    seen = None
    if window is not None and window < size:
        places = torch.arange(size, device=like.device)
        seen = ((places[:, None] - places).abs() < window)[None, None]
    if any(length < size for length in lengths):
        ends = sent(torch.tensor(lengths), like.device)[:, None, None, None]
        inside = torch.arange(size, device=like.device) < ends
        seen = inside if seen is None else seen & inside
    if seen is None:
        return None
    return like.new_zeros(seen.shape).masked_fill_(seen.logical_not(), -torch.inf)
