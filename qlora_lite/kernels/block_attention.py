"""Causal attention, one block of queries at a time: on a CPU, and on a GPU for what no fused kernel takes.

torch's fused attention is made of many small products on a CPU; here a block of queries of all the heads that
share a key head is one matrix, multiplied with just the keys that the block can see. Only queries, keys and values
are saved: backward builds a block's weights again, so that the largest tensors are one block's weights. A processor
whose fused kernel is the faster one can take it for the values. ``tools/bench/limit`` shows what attention takes of a
step.

The weights are ``softmax(scaling * q k^T)``, with scores that may be capped first (Gemma-2) and with sinks, which take
a share of the weights and give nothing (gpt-oss). A GPU's fused kernels know neither; written out for a whole row,
the scores of all heads would take the square of its length. Products accumulate in float32 and the softmax is taken in
float32; scores and weights are rounded to the inputs' type between the products. That is transformers' eager
attention, with its error (in bf16 about three times that of the fused kernel, which keeps the scores in
float32; doing so here would cost time).

Shapes: query [B, H, T, D], key and value [B, K, T, D], H a multiple of K, G = H / K; result [B, T, H, D]. Inside,
all of them lie by key head and then by token, [B * K, T + 32, G, D] (G is 1 for keys and values), so that the
queries of a block are one matrix [G * n, D] without a copy.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from qlora_lite.memory.shapes import CPU_MULTIPLE, device_type, few_of_many, kernel_rows
from qlora_lite.offload.checkpoint import kept_result

BLOCK_QUERIES = 128  # a multiple of CPU_MULTIPLE; fewer means more calls, more means weights that leave the cache


class Block(NamedTuple):
    """Token positions of a block: queries, how many of them only fill it up to whole kernels, and the keys they see.

    What fills up the last block of a row are tokens of the next, whose own block comes later.
    """

    queries: slice
    filler: int
    keys: slice


def block_attention(
    query,
    key,
    value,
    row_lengths,
    scaling=None,
    window=None,
    softcap=None,
    sinks=None,
    attend: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attend causally within each of the packed sequences.

    Args:
        query, key, value: bfloat16, float16 or float32, all the same.
        row_lengths: tokens in each row; tokens behind the last one get zeros.
        scaling: factor on the scores; None means 1 / sqrt(D).
        window: a token sees itself and this many minus one before it; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None for off.
        sinks: [H], one more score of each head; frozen, they get no gradient. None for off.
        attend: computes the result, where there is a faster way to its value; gradients are taken here all the same.
    """
    scores = Scores(query.shape[3] ** -0.5 if scaling is None else scaling, window, softcap)
    return _BlockAttention.apply(query, key, value, sinks, tuple(row_lengths), scores, attend)


class Scores(NamedTuple):
    """How scores are made of products; see ``block_attention``."""

    scaling: float
    window: int | None
    softcap: float | None


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, row_lengths, scores, attend):
        ctx.row_lengths, ctx.scores = row_lengths, scores
        ctx.key_heads, ctx.tokens = key.shape[1:3]
        q, k, v = (_by_key_head(tensor.transpose(1, 2), ctx.key_heads) for tensor in (query, key, value))
        ctx.save_for_backward(q, k, v, sinks)

        def compute() -> torch.Tensor:
            return _by_token(_attend(q, k, v, sinks, row_lengths, scores), ctx.key_heads, ctx.tokens)

        # on a GPU there may be no room for what is kept, and a policy says what is
        out = kept_result(attend or compute) if device_type(query.device) == "cpu" else compute()
        return out.detach()  # a new tensor, as autograd wants of a function's result

    @staticmethod
    def backward(ctx, grad_out):
        grad_out = _by_key_head(grad_out, ctx.key_heads)
        query, key, value, sinks = ctx.saved_tensors
        grads = _gradients(query, key, value, sinks, grad_out, ctx.row_lengths, ctx.scores)
        return *(_by_token(grad, ctx.key_heads, ctx.tokens).transpose(1, 2) for grad in grads), *(None,) * 4


def block_gradients(
    query, key, value, grad_out, row_lengths, scaling=None, window=None, softcap=None, sinks=None
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of ``block_attention`` for query, key and value, given that of its result."""
    scores, key_heads = Scores(query.shape[3] ** -0.5 if scaling is None else scaling, window, softcap), key.shape[1]
    q, k, v = (_by_key_head(tensor.transpose(1, 2), key_heads) for tensor in (query, key, value))
    grads = _gradients(q, k, v, sinks, _by_key_head(grad_out, key_heads), row_lengths, scores)
    return tuple(_by_token(grad, key_heads, key.shape[2]).transpose(1, 2) for grad in grads)


def _gradients(query, key, value, sinks, grad_out, row_lengths, scores: Scores) -> tuple[torch.Tensor, ...]:
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))

    def go_back(block: Block) -> None:
        q, k, v = _rows(query, block.queries), _rows(key, block.keys), _rows(value, block.keys)
        grad = _without_filler(_rows(grad_out, block.queries), block)
        weights, capped = _weights(q, k, sinks, block, scores)
        _rows(grad_value, block.keys).add_(weights.transpose(1, 2) @ grad)
        # a sink's own weight has no gradient, and adds nothing to the sums in here
        grad_scores = torch.ops.aten._softmax_backward_data(grad @ v.transpose(1, 2), weights, -1, weights.dtype)
        if capped is not None:
            grad_scores = torch.ops.aten.tanh_backward(grad_scores, capped)
        _rows(grad_query, block.queries).baddbmm_(grad_scores, k, beta=0, alpha=scores.scaling)
        _rows(grad_key, block.keys).add_(grad_scores.transpose(1, 2) @ q)

    for block in _blocks(row_lengths, query.device, scores.window):
        go_back(block)
    return grad_query, grad_key.mul_(scores.scaling).to(key.dtype), grad_value.to(key.dtype)


def _attend(query, key, value, sinks, row_lengths, scores: Scores) -> torch.Tensor:
    out = query.new_zeros(*query.shape[:3], value.shape[3])  # heads of values may be of another size (DeepSeek-V3)

    def attend(block: Block) -> None:
        weights, _ = _weights(_rows(query, block.queries), _rows(key, block.keys), sinks, block, scores)
        _rows(out, block.queries).copy_(_without_filler(weights @ _rows(value, block.keys), block))

    for block in _blocks(row_lengths, query.device, scores.window):
        attend(block)
    return out


def _blocks(row_lengths: Sequence[int], device: torch.device, window: int | None) -> Iterator[Block]:
    """Cut rows, in order, into blocks whose counts of queries and of keys are multiples of ``CPU_MULTIPLE``."""
    row = 0
    for length in row_lengths:
        blocks = []
        for start in range(0, length, BLOCK_QUERIES):
            count = min(BLOCK_QUERIES, length - start)
            whole = kernel_rows(count, device)
            first = 0 if window is None else max(0, start + 1 - window) // CPU_MULTIPLE * CPU_MULTIPLE
            end = row + start + whole
            blocks.append(Block(slice(row + start, end), whole - count, slice(row + first, end)))
        yield from few_of_many(blocks, _average, _size)
        row += length


def _size(block: Block) -> tuple[int, int]:
    return block.queries.stop - block.queries.start, block.keys.stop - block.keys.start


def _average(blocks: Sequence[Block]) -> Block:
    """Return a block that takes the average work of some of one row, all of which have the first one's queries."""
    keys = sum(block.keys.stop - block.keys.start for block in blocks) // len(blocks)
    first = blocks[0]
    return Block(first.queries, first.filler, slice(first.keys.start, first.keys.start + keys))


def _by_key_head(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Copy [B, T, H, D] to [B * K, T + 32, G, D], with zeros behind, which the last block's filler may reach."""
    grouped = tensor.unflatten(2, (key_heads, -1)).transpose(1, 2)
    return pad(grouped, (0, 0, 0, 0, 0, CPU_MULTIPLE)).flatten(0, 1)


def _by_token(tensor: torch.Tensor, key_heads: int, tokens: int) -> torch.Tensor:
    """Undo ``_by_key_head``; the result is contiguous."""
    return tensor.unflatten(0, (-1, key_heads))[:, :, :tokens].transpose(1, 2).flatten(2, 3).contiguous()


def _rows(tensor: torch.Tensor, tokens: slice) -> torch.Tensor:
    """Return the part [B * K, n * G, D] of some tokens; a view."""
    return tensor[:, tokens].flatten(1, 2)


def _without_filler(part: torch.Tensor, block: Block) -> torch.Tensor:
    """Return a block's part with zeros in the filler's place."""
    if not block.filler:
        return part
    filler = block.filler * part.shape[1] // (block.queries.stop - block.queries.start)
    return pad(part[:, :-filler], (0, 0, 0, filler))


def _weights(q, k, sinks, block: Block, how: Scores) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights [B * K, n * G, keys] of a block, and the tanh that capped its scores; None without a cap."""
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=how.scaling)
    capped = None
    if how.softcap:
        capped = scores.div_(how.softcap).tanh_()
        scores = capped * how.softcap
    count = block.queries.stop - block.queries.start
    by_token = scores.view(q.shape[0], count, -1, k.shape[1])  # [B * K, n, G, keys]
    reach = count if how.window is None else k.shape[1]  # only the last keys can be later than a query
    hidden = torch.ones(count, reach, dtype=torch.bool, device=q.device).triu_(reach - count + 1)
    if how.window is not None:
        hidden |= torch.ones_like(hidden).tril_(reach - count - how.window)
    by_token[..., -reach:].masked_fill_(hidden[:, None], -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1), capped
    column = sinks.to(scores.dtype).view(-1, 1, by_token.shape[2], 1)  # [K, 1, G, 1]
    column = column.repeat(q.shape[0] // column.shape[0], count, 1, 1).flatten(1, 2)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1], capped
