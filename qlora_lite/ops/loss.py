"""Cross-entropy of a language-model head, a few tokens at a time.

The logits of a whole batch are the largest tensor of a plain training step (tokens x vocabulary, in
float32). Here the head is applied to ``chunk_tokens`` labelled tokens at a time and each chunk's gradient
with respect to the hidden states is formed while its logits exist. Backward then only scales that
gradient: no logits are kept, and the head is not multiplied a third time as a checkpointed loss would.

The head is frozen, so it gets no gradient.

Legend: N labelled tokens, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch

from .shapes import pad_rows

LOGITS_BUDGET_BYTES = 128 * 2**20  # what an automatic chunk may hold at once


class Head(NamedTuple):
    """A frozen output head: ``logits = cap(scale * (hidden @ weight.T + bias))``.

    weight [V, D]; bias [V] or None; softcap None means no cap, else ``softcap * tanh(logits / softcap)``.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def auto_chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens keep a chunk's logits (bf16 and float32 copies) near 128 MiB, at least 32."""
    return max(32, LOGITS_BUDGET_BYTES // (6 * vocabulary))


def head_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return float32 logits [N, V] of hidden states [N, D]."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
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
    return _ChunkedCrossEntropy.apply(hidden, targets, head, chunk_tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, chunk_tokens):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            loss, grad = _chunk(hidden[chunk], targets[chunk, None], head, grad_hidden is not None)
            total += loss
            if grad_hidden is not None:
                grad_hidden[chunk] = grad
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total, None, None, None


def _chunk(hidden, targets, head: Head, with_grad: bool):
    """Return the summed loss of one chunk and, if asked for, its gradient with respect to ``hidden``."""
    count = hidden.shape[0]
    logits = head_logits(pad_rows(hidden), head)
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = (log_total[:count] - logits[:count].gather(1, targets)).sum()
    if not with_grad:
        return loss, None
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    grad = logits.sub_(log_total).exp_()  # in place: the softmax takes the place of the logits
    grad[:count].scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
    if slope is not None:
        grad *= slope
    if head.scale != 1.0:
        grad *= head.scale
    return loss, (grad.to(hidden.dtype) @ head.weight)[:count]
