"""Causal attention on a CPU, one block of queries at a time.

torch's fused attention is made of many small products on a CPU; here a block of queries of all the heads that
share a key head is one matrix, multiplied with just the keys that the block can see: two thirds of the time,
forward and backward (9 heads of 64 over 3 key heads, 512 tokens in bf16, two cores: 3.6 and 8.2 ms against 5.3
and 12.6). Only queries, keys and values are saved: backward builds a block's weights again, so that the largest
tensors are one block's weights.

The weights are ``softmax(scaling * q k^T)``. Products accumulate in float32 and the softmax is taken in
float32; scores and weights are rounded to the inputs' type between the products. That is transformers' eager
attention, with its error (in bf16 about three times that of the fused kernel, which keeps the scores in
float32; doing so here costs all of the time won).

Shapes: query [B, H, T, D], key and value [B, K, T, D], H a multiple of K, G = H / K; result [B, T, H, D]. A
block of n queries is [B * K, G * n, D].
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .checkpoint import kept_result
from .shapes import CPU_MULTIPLE, kernel_rows

BLOCK_QUERIES = 128  # a multiple of CPU_MULTIPLE; fewer means more calls, more means weights that leave the cache


class Block(NamedTuple):
    """Token positions of a block: queries, filled up to whole kernels by ``filler``, and the keys they see."""

    queries: slice
    filler: int
    keys: slice


def block_attention(query, key, value, row_lengths, scaling=None, window=None) -> torch.Tensor:
    """Attend causally within each of the rows laid end to end.

    Args:
        query, key, value: bfloat16, float16 or float32, all the same.
        row_lengths: tokens in each row; tokens behind the last one get zeros.
        scaling: factor on the scores; None means 1 / sqrt(D).
        window: a token sees itself and this many minus one before it; None for all.
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return _BlockAttention.apply(query, key, value, tuple(row_lengths), scaling, window)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, row_lengths, scaling, window):
        query = query.unflatten(1, (key.shape[1], -1))
        key, value = _padded(key), _padded(value)
        out = kept_result(lambda: _attend(query, key, value, row_lengths, scaling, window))
        ctx.row_lengths, ctx.scaling, ctx.window = row_lengths, scaling, window
        ctx.save_for_backward(query, key, value)
        return out.detach()  # a new tensor, as autograd wants of a function's result

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value = ctx.saved_tensors
        grad_out = grad_out.unflatten(2, query.shape[1:3]).permute(0, 2, 3, 1, 4)
        grad_query = torch.zeros_like(query)
        grad_key, grad_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
        for block in _blocks(ctx.row_lengths, query, ctx.window):
            keys, q, grad = block.keys, _gather(query, block), _gather(grad_out, block)
            with torch.enable_grad():
                scores = _scores(q, key[:, keys], block, ctx.scaling, ctx.window).requires_grad_()
                weights = torch.softmax(scores, -1)
            grad_value[:, keys] += weights.detach().transpose(1, 2) @ grad
            (grad_scores,) = torch.autograd.grad(weights, scores, grad @ value[:, keys].transpose(1, 2))
            _scatter((grad_scores @ key[:, keys]).mul_(ctx.scaling), grad_query, block)
            grad_key[:, keys] += grad_scores.transpose(1, 2) @ q
        tokens, grad_key = query.shape[3], grad_key.mul_(ctx.scaling)
        grads = (g[:, :tokens].to(key.dtype).unflatten(0, query.shape[:2]) for g in (grad_key, grad_value))
        return grad_query.flatten(1, 2), *grads, None, None, None


def _attend(query, key, value, row_lengths, scaling, window) -> torch.Tensor:
    """Return [B, T, H, D] for query [B, K, G, T, D], padded key and value [B * K, T + 32, D]."""
    out = query.new_zeros(query.shape[0], query.shape[3], *query.shape[1:3], query.shape[4])
    for block in _blocks(row_lengths, query, window):
        scores = _scores(_gather(query, block), key[:, block.keys], block, scaling, window)
        _scatter(torch.softmax(scores, -1) @ value[:, block.keys], out.permute(0, 2, 3, 1, 4), block)
    return out.flatten(2, 3)


def _blocks(row_lengths: Sequence[int], query: torch.Tensor, window: int | None) -> Iterator[Block]:
    """Cut rows into blocks whose counts of queries and of keys are multiples of ``CPU_MULTIPLE``."""
    row = 0
    for length in row_lengths:
        for start in range(0, length, BLOCK_QUERIES):
            count = min(BLOCK_QUERIES, length - start)
            whole = kernel_rows(count, query.device)
            first = 0 if window is None else max(0, start + 1 - window) // CPU_MULTIPLE * CPU_MULTIPLE
            keys = slice(row + first, row + start + whole)
            yield Block(slice(row + start, row + start + count), whole - count, keys)
        row += length


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """Return keys or values as [B * K, T, D] with zeros behind, which the last block's filler may reach."""
    return pad(tensor, (0, 0, 0, CPU_MULTIPLE)).flatten(0, 1)


def _gather(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """Copy a block's part of [B, K, G, T, D] to [B * K, G * n, D], with zeros for filler."""
    part = tensor[:, :, :, block.queries]
    if block.filler:
        part = pad(part, (0, 0, 0, block.filler))
    return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[4])


def _scatter(part: torch.Tensor, tensor: torch.Tensor, block: Block) -> None:
    """Write what ``_gather`` would read, without the filler."""
    count = block.queries.stop - block.queries.start
    part = part.view(*tensor.shape[:3], count + block.filler, -1)
    tensor[:, :, :, block.queries] = part[:, :, :, :count]


def _scores(q, k, block: Block, scaling: float, window: int | None) -> torch.Tensor:
    """Return ``scaling * q k^T`` [B * K, G * n, keys] with -inf where a key is later, or outside the window."""
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=scaling)
    count = block.queries.stop - block.queries.start + block.filler
    reach = count if window is None else k.shape[1]  # only the last keys can be later than a query
    distance = torch.arange(count)[:, None] + (reach - count) - torch.arange(reach)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores.view(q.shape[0], -1, count, k.shape[1])[..., -reach:].masked_fill_(hidden, -torch.inf)
    return scores
