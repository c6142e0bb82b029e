"""Attention of a language model in which the tokens of a picture see all of their picture, and not only those before.

Gemma 3's do, and Gemma 4's in layers that see a window alone: causal attention decides what text sees, and what a
picture's tokens see of the text before them. So the causal result is taken, and that of each picture's tokens is
replaced by attention from them to all from the beginning of their row to the end of the picture, one call a picture. In
a window a token still sees none that is so many before it, and all of its picture behind it. (A mask over the whole
row, the usual way, takes the square of its length.)

Shapes: query [1, H, T, D], key and value [1, K, T, D], result [1, T, H, D]; a picture has P tokens.

Source: transformers, ``create_masks_for_vision_model`` of Gemma 3 and 4.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from .fused_attention import fused_attention


def seeing_pictures(
    out: torch.Tensor,
    query,
    key,
    value,
    begins: Sequence[int],
    sizes: Sequence[int],
    row_lengths: Sequence[int],
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Return the result of causal attention with that of pictures' tokens replaced.

    Args:
        out: of causal attention, [1, T, H, D].
        begins: the first token of each picture, rising.
        sizes: P of each.
        row_lengths: tokens in each packed row.
        scaling: factor on the scores; None means 1 / sqrt(D).
        window: a token sees itself and this many minus one before it; None for all.
    """
    ends, pieces, at = [*accumulate(row_lengths)], [], 0
    for begin, tokens in zip(begins, sizes, strict=True):
        row = bisect_right(ends, begin)
        first, end = ends[row] - row_lengths[row], begin + tokens
        if window is not None:
            first = max(first, begin - window + 1)
        mask = None if window is None else _window(begin, first, end, window, query)
        seen = key[:, :, first:end], value[:, :, first:end]
        found = fused_attention(query[:, :, begin:end], *seen, mask, scaling, causal=False)
        pieces += [out[:, at:begin], found.transpose(1, 2)]
        at = end
    return torch.cat([*pieces, out[:, at:]], dim=1)


def _window(begin: int, first: int, end: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
    """Return what a picture's tokens see, additive [P, end - first]; None where that is all."""
    if end - 1 - window < first:
        return None
    query = torch.arange(begin, end, device=like.device)[:, None]
    hidden = torch.arange(first, end, device=like.device) <= query - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
