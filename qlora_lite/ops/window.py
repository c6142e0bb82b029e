"""Causal attention in which a token sees itself and a fixed number of tokens before it.

Given a mask over a whole row, a fused kernel computes what the mask hides, and the mask alone takes the square of the
row's length. Here a row is cut into chunks as long as the window. A chunk sees itself and the chunk before, so that all
whole chunks are one call with one small mask between them; time and memory grow with the length of the row.

Shapes: query [B, H, T, D], key and value [B, K, T, D]; W is the window.
"""

from collections.abc import Callable

import torch

from .shapes import device_type

_MASK_MULTIPLE = 16  # entries, of a mask's rows in memory: a card's kernel copies others


def window_attention(attend: Callable[..., torch.Tensor], query, key, value, window: int | None) -> torch.Tensor:
    """Attend within one row, of each sequence in the batch.

    Args:
        attend: returns [B, H, Tq, D] for a query, a key, a value and a mask [Tq, Tk]; causal where the mask is None.
        window: a token sees itself and this many minus one before it; None for all.

    Returns:
        [B, T, H, D].
    """
    length = query.shape[2]
    if window is None or length <= window:
        return attend(query, key, value, None).transpose(1, 2)
    mask = window_mask(min(window, length - window), window, query)
    outs = [attend(*(tensor[:, :, :window] for tensor in (query, key, value)), None).transpose(1, 2)]
    whole = length // window * window
    if whole > window:
        q, k, v = (_chunks(tensor[:, :, :whole], window) for tensor in (query, key, value))
        with_previous = (torch.cat([tensor[:, :-1], tensor[:, 1:]], dim=3) for tensor in (k, v))
        out = attend(*(tensor.flatten(0, 1) for tensor in (q[:, 1:], *with_previous)), mask)
        outs.append(out.transpose(1, 2).unflatten(0, (len(query), -1)).flatten(1, 2))
    if rest := length - whole:
        seen = (tensor[:, :, whole - window :] for tensor in (key, value))
        outs.append(attend(query[:, :, whole:], *seen, mask[:rest, : window + rest]).transpose(1, 2))
    return torch.cat(outs, dim=1)


def window_mask(queries: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Return what ``queries`` tokens see of the ``window`` tokens before them and of themselves.

    Args:
        like: a query. For a card's, the mask is additive and of its type, which its kernel would make of another.

    Returns:
        [queries, window + queries], bool or additive.
    """
    query = torch.arange(queries, device=like.device)[:, None]
    key = torch.arange(window + queries, device=like.device)
    seen = (query < key) & (key <= query + window)
    if device_type(like.device) != "cuda":
        return seen
    row = -(-len(key) // _MASK_MULTIPLE) * _MASK_MULTIPLE
    mask = like.new_empty(queries, row)[:, : len(key)]
    return mask.zero_().masked_fill_(seen.logical_not_(), -torch.inf)


def _chunks(tensor: torch.Tensor, window: int) -> torch.Tensor:
    """Cut [B, H, n * W, D] into [B, n, H, W, D]; a view."""
    return tensor.unflatten(2, (-1, window)).transpose(1, 2)
