"""Flash attention over packed sequences in one call, on a GPU.

The kernel takes where each sequence ends, and a window, so that neither operators nor bytes grow with the number of
sequences; attending to one after the other (``attention``) takes as many operators as there are, and again in backward.
``torch.nn.attention.varlen.varlen_attn`` calls the same operators behind two of its own, written in Python, which take
the host's time, and offers no part of a backward.

Backward takes memory that no tensor outside of it shows, 128 tokens' more for each sequence (``scratch_bytes``). As for
one sequence (``fused_attention``), a plan adds it, and where it is much, a few heads go back at a time.

Tokens behind the last sequence must not come in: their gradients would be what lay in that memory before (pytorch issue
176793).

Shapes: T tokens, H heads, K key heads, D a head's size.
Source of the sizes: mha_varlen_bwd in torch's flash_attn/flash_api.cpp, and attention_backward.cu; read for torch 2.11
to 2.13.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from qlora_lite.memory.shapes import on_gpu
from qlora_lite.offload.transfer import sent

from .fused_attention import flash_bytes, key_heads_at_once, over_key_heads, runs_flash

FORWARD, BACKWARD = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
_SPARE = 128  # tokens of memory inside of a backward, for each sequence


def sequence_ends(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return where sequences end, int32 [n + 1], with a zero before the first.

    Of a plan they have values all the same, since its work follows from them.
    """
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return ends if device.type == "meta" else sent(ends, device)


def kernel_takes(query, key, value, lengths: Sequence[int]) -> bool:
    """Return whether ``packed_attention`` can attend to sequences of these lengths."""
    if not on_gpu(query) or torch.are_deterministic_algorithms_enabled():
        return False
    batch, _, tokens, size = query.shape
    whole = batch == 1 and sum(lengths) == tokens and size % 8 == 0
    return whole and runs_flash(query, key, value, 0.0)


def packed_attention(query, key, value, ends, lengths, scaling=None, window=None) -> torch.Tensor:
    """Attend causally within each sequence; see ``kernel_takes``.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D], H a multiple of K.
        ends: see ``sequence_ends``.
        lengths: tokens of each sequence, T in all.
        scaling: factor on the scores; None means 1 / sqrt(D).
        window: a token sees itself and this many minus one before it; None for all.

    Returns:
        [1, H, T, D].
    """
    longest = max(lengths)
    window = None if window is None or window >= longest else window
    key_heads = key_heads_at_once(query, key, query.shape[2] + _SPARE * len(lengths))
    tensors = (tensor.transpose(1, 2).squeeze(0) for tensor in (query, key, value))
    out = _PackedAttention.apply(*tensors, ends, longest, scaling, window, key_heads)
    return out[None].transpose(1, 2)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, ends, longest, scaling, window, key_heads):
        sees = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        ctx.settings = (ends, ends, longest, longest, 0.0, window is None), {"scale": scaling} | sees
        out, logsumexp, *ctx.state, _ = FORWARD(query, key, value, *ctx.settings[0], False, **ctx.settings[1])
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.key_heads = key_heads
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, logsumexp = ctx.saved_tensors
        places, settings = ctx.settings

        def gradients(grad, query, key, value, out, heads: slice) -> tuple[torch.Tensor, ...]:
            return BACKWARD(grad, query, key, value, out, logsumexp[heads], *places, *ctx.state, **settings)

        if ctx.key_heads >= key.shape[1]:
            return *gradients(grad_out, query, key, value, out, slice(None)), *(None,) * 5
        return *over_key_heads(ctx.key_heads, gradients, grad_out, query, key, value, out), *(None,) * 5


def scratch_bytes(grad_out, query, key, _value, out, _logsumexp, ends, *_others, **_unused) -> int:
    """Return the bytes of scratch memory of the kernel's backward, given its operator's arguments."""
    rows = len(query) + _SPARE * (len(ends) - 1)
    copied = sum(tensor.nbytes for tensor in (out, grad_out) if not tensor.is_contiguous())
    return flash_bytes(query.transpose(0, 1)[None], query.shape[1] // key.shape[1], rows) + copied
