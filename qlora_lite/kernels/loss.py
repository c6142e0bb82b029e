"""Cross-entropy of a language-model head, a few tokens and a few thousand words at a time.

The logits of a whole batch are the largest tensor of a plain training step (tokens x vocabulary, in
float32). Here the head is applied to ``chunk_tokens`` target tokens and ``TILE_WORDS`` words at a time,
with a running maximum and sum as in flash attention (arXiv 2205.14135): the gradient with respect to the
hidden states is ``softmax(logits) @ weight - weight[target]``, so each tile adds its share while its logits
exist. Backward then only scales that gradient: no logits are kept, the head is read once per chunk, and it
is not multiplied a third time as a checkpointed loss would.

A head that is trained too gets its gradient in backward, ``(softmax(logits) - target)^T @ hidden``: the logits are
computed once more, a tile of words at a time over all tokens, each tile's sum in float32 and rounded once.

Legend: N target tokens, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch

from qlora_lite.memory.shapes import device_type, pad_rows, pieces
from qlora_lite.offload.transfer import part

from .token_rows import RowsOver

# Words that the head is multiplied with at once, and tokens whose logits of these are in float32 at once. On a CPU both
# are few: malloc gives a tensor of 32 MiB (1,024 tokens x 8,192 words, float32) pages that were never touched, time
# after time, and the logits of few tokens stay in the cache. ``tools/bench/limit`` shows the time of the loss.
TILE_WORDS = {"cuda": 8192, "cpu": 2048}
TILE_TOKENS = {"cuda": 1 << 30, "cpu": 128}
AUTO_CHUNK_TOKENS = 1024  # at once 48 MiB of logits in bf16 and float32 on a GPU, 5 MiB on a CPU


class Head(NamedTuple):
    """An output head: ``logits = cap(scale * (hidden @ weight.T + bias))``.

    weight [V, D], a tensor or anything that gives rows of one for a slice or for numbers; bias [V] or None; softcap
    None means no cap, else ``softcap * tanh(logits / softcap)``.
    """

    weight: Any
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return float32 logits [..., V] of hidden states [..., D]."""
    return _finished(head_products(hidden, head), head)


def head_products(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return ``hidden @ weight.T + bias`` [..., V], of a few thousand words after the other."""
    tiles = pieces(head.weight.shape[0], TILE_WORDS[device_type(hidden.device)])
    return torch.cat([_tile_products(hidden, head, words)[0] for words in tiles], dim=-1)


def _tile_products(hidden: torch.Tensor, head: Head, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``hidden @ weight.T + bias`` of some words, and their weight."""
    weight, bias = head.weight[words].to(hidden.dtype), None if head.bias is None else head.bias[words]
    return torch.nn.functional.linear(hidden, weight, bias), weight


def _finished(products: torch.Tensor, head: Head) -> torch.Tensor:
    """Return float32 logits of what hidden states and the head's weight (and bias) gave; float32 changes in place."""
    logits = products.float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = torch.tanh_(logits.div_(head.softcap)).mul_(head.softcap)
    return logits


def chunked_cross_entropy(hidden, targets, head: Head, chunk_tokens: int) -> torch.Tensor:
    """Return the float32 sum of ``-log softmax(logits)[target]`` over N tokens.

    Equals ``F.cross_entropy(head_logits(hidden, head), targets, reduction="sum")``.

    Args:
        hidden: [N, D], only the rows that have a target.
        targets: int64 [N], no ignored value among them.
        chunk_tokens: tokens whose logits exist at once, at least 1.
    """
    return _ChunkedCrossEntropy.apply(hidden, targets, head, chunk_tokens, _trained(head), head.bias)


def sequence_losses(hidden, targets, head: Head, chunk_tokens: int, sequences, count: int) -> torch.Tensor:
    """Return the sums of ``-log softmax(logits)[target]`` over the targets of each sequence, float32 [count].

    Losses of whole sequences (a preference, for one) are functions of these sums. What such a loss has for a gradient
    with respect to a sequence's sum is known only when all sums are, but it is one number for all of the sequence's
    tokens: backward multiplies the tokens' gradients by it, which forward has formed. So one pass is enough, and no
    logits outlive their chunk.

    Args:
        hidden, targets, chunk_tokens: see ``chunked_cross_entropy``.
        sequences: int64 [N], the sequence of each target.
        count: how many sequences there are.
    """
    return _ChunkedCrossEntropy.apply(hidden, targets, head, chunk_tokens, _trained(head), head.bias, sequences, count)


def _trained(head: Head) -> torch.Tensor | None:
    """Return the weight of a head as a tensor that can have a gradient; None where it is frozen."""
    weight = head.weight.trained if isinstance(head.weight, RowsOver) else head.weight
    return weight if isinstance(weight, torch.Tensor) else None


def token_losses(hidden, targets, head: Head, chunk_tokens: int) -> torch.Tensor:
    """Return ``-log softmax(logits)[target]`` of each of N tokens, float32 [N]; without gradient.

    Args:
        hidden, targets, chunk_tokens: see ``chunked_cross_entropy``.
    """
    chunks = pieces(hidden.shape[0], chunk_tokens)
    return torch.cat([_chunk(hidden[chunk], part(targets, chunk), head, None)[0] for chunk in chunks])


def likeliest_tokens(hidden, head: Head, chunk_tokens: int) -> torch.Tensor:
    """Return the likeliest token after each of N hidden states, int64 [N], the first of equals.

    Scale and cap of the head are left out, since they change no order.

    Args:
        hidden, chunk_tokens: see ``chunked_cross_entropy``.
    """
    return torch.cat([_likeliest(hidden[chunk], head) for chunk in pieces(hidden.shape[0], chunk_tokens)])


def _likeliest(hidden, head: Head) -> torch.Tensor:
    count, hidden = hidden.shape[0], pad_rows(hidden)
    top = hidden.new_full((hidden.shape[0],), -torch.inf)
    found = torch.zeros_like(top, dtype=torch.int64)
    for words in pieces(head.weight.shape[0], TILE_WORDS[device_type(hidden.device)]):
        best, place = _tile_products(hidden, head, words)[0].max(dim=1)
        found = torch.where(best > top, place + words.start, found)
        top = torch.maximum(top, best)
    return found[:count]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, chunk_tokens, weight, bias, sequences=None, count=0):
        shape = () if sequences is None else (count,)
        total = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        trains_head = any(ctx.needs_input_grad[4:])
        log_sums = total.new_empty(hidden.shape[0]) if trains_head else None
        for chunk in pieces(hidden.shape[0], chunk_tokens):
            grad = None if grad_hidden is None else grad_hidden[chunk]
            losses, sums = _chunk(hidden[chunk], part(targets, chunk), head, grad)
            if sequences is None:
                total += losses.sum()
            else:
                total.index_add_(0, part(sequences, chunk), losses)
            if log_sums is not None:
                log_sums[chunk] = sums
            del losses, sums  # before the next chunk's are there
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        of_head = (hidden, targets, log_sums, weight, bias) if trains_head else ()
        ctx.save_for_backward(sequences, grad_hidden, *of_head)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        sequences, grad_hidden, *of_head = ctx.saved_tensors
        if sequences is not None:
            grad_total = grad_total[sequences]  # of each token
        grads = None, None
        if of_head:
            (hidden, targets, log_sums, weight, bias), head = of_head, ctx.head
            if isinstance(head.weight, RowsOver):  # as if its trained rows were all there are
                targets = head.weight.places(targets)
            head = head._replace(weight=head.weight if weight is None else weight, bias=bias)
            wants_weight = ctx.needs_input_grad[4]
            grads = _head_gradients(hidden, targets, log_sums, head, ctx.chunk_tokens, grad_total, wants_weight)
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, grad_total, ctx.chunk_tokens)
        return grad_hidden, None, None, None, *grads, None, None


def _scaled(grad_hidden, scales, chunk_tokens: int) -> torch.Tensor:
    """Return gradients [N, D] times one number, or times one for each token [N], computed in float32."""
    if scales.dim() == 0:
        return grad_hidden * scales
    scaled = torch.empty_like(grad_hidden)
    for chunk in pieces(len(grad_hidden), chunk_tokens):
        scaled[chunk] = grad_hidden[chunk] * scales[chunk][:, None]
    return scaled


def _head_gradients(
    hidden, targets, log_sums, head: Head, chunk_tokens: int, grad_total, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of a head's weight and bias.

    Args:
        log_sums: logarithm of each token's sum of exponentials, float32 [N].
        grad_total: of the loss, float32 [], or of each token's, float32 [N].
        wants_weight: whether the weight's is asked for, which is a tensor then.
    """
    grad_weight = torch.empty_like(head.weight) if wants_weight else None
    grad_bias = None if head.bias is None else torch.empty_like(head.bias)
    for words in pieces(head.weight.shape[0], TILE_WORDS[device_type(hidden.device)]):
        count = len(range(*words.indices(head.weight.shape[0])))
        of_weight = hidden.new_zeros((count if wants_weight else 0, hidden.shape[1]), dtype=torch.float32)
        of_bias = of_weight.new_zeros(count)
        for chunk in pieces(hidden.shape[0], chunk_tokens):
            count, rows = hidden[chunk].shape[0], pad_rows(hidden[chunk])
            logits = _finished(_tile_products(rows, head, words)[0], head)[:count]
            slopes = None if head.softcap is None else 1 - (logits / head.softcap).square_()
            grads = logits.sub_(log_sums[chunk][:, None]).exp_()
            place = part(targets, chunk) - words.start
            inside = (place >= 0) & (place < grads.shape[1])
            grads.scatter_add_(1, place.clamp(0, grads.shape[1] - 1)[:, None], -inside.float()[:, None])
            grads.mul_((grad_total if grad_total.dim() == 0 else grad_total[chunk][:, None]) * head.scale)
            grads = pad_rows((grads if slopes is None else grads.mul_(slopes)).to(hidden.dtype))
            if grad_weight is not None:
                of_weight += grads.t() @ rows
            of_bias += grads.sum(0, dtype=torch.float32)
        if grad_weight is not None:
            grad_weight[words] = of_weight
        if grad_bias is not None:
            grad_bias[words] = of_bias
    return grad_weight, grad_bias


def _chunk(hidden, numbers, head: Head, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of one chunk and the logarithms of its tokens' sums of exponentials, float32 [n].

    The gradient of the losses' sum with respect to ``hidden`` is put into ``grad``, if there.
    """
    count, hidden, device = hidden.shape[0], pad_rows(hidden), device_type(hidden.device)
    targets = numbers[:, None]
    sums = _Sums(hidden, count, grad is not None)
    for words in pieces(head.weight.shape[0], TILE_WORDS[device]):
        sums.add(hidden, targets, head, words, TILE_TOKENS[device])
    if grad is not None:
        target_slopes = 1.0 if head.softcap is None else 1 - (sums.target_logits / head.softcap).square()
        expected = (sums.grad / sums.total)[:count]
        grad.copy_((expected - target_slopes * head.weight[numbers]) * head.scale)
    log_sums = (sums.top + sums.total.log())[:count]
    return (log_sums - sums.target_logits).squeeze(1), log_sums.squeeze(1)


class _Sums:
    """What is known of a chunk's logits after some tiles of words.

    top, total [N, 1]: their maximum, and the sum of ``exp(logit - top)``; grad [N, D]: the weight's rows, summed up by
    the same exponentials (times the soft cap's slopes); target_logits [count, 1]. All in float32.
    """

    def __init__(self, hidden: torch.Tensor, count: int, with_grad: bool):
        self.top = hidden.new_full((hidden.shape[0], 1), -torch.inf, dtype=torch.float32)
        self.total, self.target_logits = torch.zeros_like(self.top), torch.zeros_like(self.top[:count])
        self.grad = torch.zeros_like(hidden, dtype=torch.float32) if with_grad else None

    def add(self, hidden, targets, head: Head, words: slice, rows_at_once: int) -> None:
        """Add the tile of some words; nothing of it is left when the next one comes."""
        products, weight = _tile_products(hidden, head, words)
        place = (targets - words.start).clamp_(0, products.shape[1] - 1)
        found = _finished(products.gather(1, place), head)
        self.target_logits = torch.where(place + words.start == targets, found, self.target_logits)
        top, sums = torch.empty_like(self.top), torch.empty_like(self.top)
        for rows in pieces(hidden.shape[0], rows_at_once):
            logits = _finished(products[rows], head)
            torch.maximum(self.top[rows], logits.amax(dim=1, keepdim=True), out=top[rows])
            slopes = None if head.softcap is None or self.grad is None else 1 - (logits / head.softcap).square_()
            weights = logits.sub_(top[rows]).exp_()  # in place: not yet divided by the sum over all words
            torch.sum(weights, dim=1, keepdim=True, out=sums[rows])
            if self.grad is not None:
                products[rows] = weights if slopes is None else weights.mul_(slopes)
        shrink = torch.exp(self.top - top)
        self.top = top
        self.total.mul_(shrink).add_(sums)
        if self.grad is not None:
            self.grad.mul_(shrink).add_(products @ weight)
