"""An encoder's attention over packed sequences: each token sees all of its own sequence, or those near it.

Sequences of one length (on a CPU, of one length for its kernels) are attended to in one call, as a batch: those of a
classified text are short, and a call for each would take more than it computes. What fills a sequence up to the
kernel's length are tokens of the next one, hidden by a mask, and their own results are dropped.

In a window (ModernBERT's local layers) a token sees so many minus one before it, and as many behind it.

Shapes: query, key and value [1, H, T, D], result [1, T, H, D]; a group of n sequences of L tokens [n, H, L, D].
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import torch

from .fused_attention import fused_attention
from .shapes import kernel_rows


def encoder_attention(
    query, key, value, row_lengths: Sequence[int], scaling: float | None = None, window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Attend within each of the packed sequences; tokens behind the last one get zeros.

    Args:
        row_lengths: tokens of each; of a batch of more than one, the one length of all.
        scaling: factor on the scores; None means 1 / sqrt(D).
        window: a token sees itself, this many minus one before it, and as many behind it; None for all.
    """
    if query.shape[0] > 1:
        mask = _mask([query.shape[2]], query.shape[2], window, query)
        return fused_attention(query, key, value, mask, scaling, dropout, False).transpose(1, 2).contiguous()
    groups: dict[int, list[int]] = defaultdict(list)  # numbers of the sequences by their tokens in a call
    for number, length in enumerate(row_lengths):
        groups[kernel_rows(length, query.device)].append(number)
    starts, outs = [*accumulate(row_lengths, initial=0)], [query] * len(row_lengths)
    for size, numbers in groups.items():
        rows = [_gathered(tensor, [starts[number] for number in numbers], size) for tensor in (query, key, value)]
        lengths = [row_lengths[number] for number in numbers]
        out = fused_attention(*rows, _mask(lengths, size, window, query), scaling, dropout, False).transpose(1, 2)
        for place, number in enumerate(numbers):
            outs[number] = out[place, : row_lengths[number]]
    if behind := query.shape[2] - starts[-1]:
        outs.append(query.new_zeros(behind, *query.shape[1::2]))
    return torch.cat(outs)[None]


def _gathered(tensor: torch.Tensor, starts: Sequence[int], size: int) -> torch.Tensor:
    """Return so many tokens from each start of [1, H, T, D] as a batch, with zeros where there are none left."""
    if starts[-1] + size > tensor.shape[2]:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, starts[-1] + size - tensor.shape[2]))
    return torch.cat([tensor[:, :, start : start + size] for start in starts])


def _mask(lengths: Sequence[int], size: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return what is seen, additive and of a query's type, [n, 1, L, L] or [n, 1, 1, L]; None where that is all."""
    seen = None
    if window is not None and window < size:
        places = torch.arange(size, device=like.device)
        seen = ((places[:, None] - places).abs() < window)[None, None]
    if any(length < size for length in lengths):
        ends = torch.tensor(lengths, device=like.device)[:, None, None, None]
        inside = torch.arange(size, device=like.device) < ends
        seen = inside if seen is None else seen & inside
    if seen is None:
        return None
    return like.new_zeros(seen.shape).masked_fill_(seen.logical_not(), -torch.inf)
