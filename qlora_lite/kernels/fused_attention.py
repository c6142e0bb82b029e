"""torch's fused kernels of attention, chosen so that a GPU never falls back to the formula, and planned as they are.

On a GPU flash attention takes grouped heads but no mask, no float32 and no heads of some sizes; the memory-efficient
kernel takes all of these but no grouped heads (torch 2.13's documentation of ``scaled_dot_product_attention``, and
sdp_utils.cpp). For what neither takes, torch holds the scores of all heads; so it does on a GPU that has none of them
(experimental ones of ROCm, builds by MSVC without flash attention, which are asked once for each kind of call), and
``attention`` then goes block by block. GPUs that compute in float16 for want of bfloat16 have no flash attention; so
float16 does without it on all of them, and needs the same everywhere. cuDNN's kernel is left out: it makes a plan of
its own for every length of a row, in memory that nobody counts.

Backward, a kernel takes memory that no tensor outside of it shows: for an 8B model 32 KiB a token
(``scratch_bytes``, which a plan adds). Of a long row, flash attention's backward runs over a few heads at a time, with
so much less; heads do not see each other. A repeatable one does not: the fewer heads, the more sums it keeps of each.

Source of the sizes: mha_bwd in torch's flash_attn/flash_api.cpp and what calls it in attention_backward.cu, and
kernel_backward.h of its memory-efficient attention.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qlora_lite.memory.shapes import device_type

from .fused_norm import planned_rms_norm

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MAX_SCRATCH_BYTES = 128 * 2**20  # that a call of a backward takes inside, if it has more heads than those of one key
_ROWS = 128  # a multiple to which a kernel rounds up a row's length
# Of an RTX PRO 6000's multiprocessors: a repeatable backward has as many sums of the query's gradient as busy them all.
_MAX_PROCESSORS = 188
_MATH, _ASKED_TOKENS = SDPBackend.MATH.value, 16
_PIECE, _PIECES_AT_ONCE = 64, 200  # of the keys, in the memory-efficient kernel: its tile, and what busies a GPU
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_PLANNED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # stands for any of a GPU's
_PLANNED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention  # a GPU's, if heads of values have another size
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward
BACKWARDS = _PLANNED_BACKWARD, _FLASH_BACKWARD, _EFFICIENT_BACKWARD  # what ``scratch_bytes`` is of


def fused_attention(query, key, value, mask, scaling, dropout=0.0, causal=True) -> torch.Tensor:
    """Attend; causally without a mask, if that is not to be otherwise.

    Args:
        query: [B, H, Tq, D].
        key, value: [B, K, Tk, D], H a multiple of K.
        mask: additive, or bool for what is seen, [Tq, Tk] or [B, 1, Tq, Tk]; None where each sees itself and those
            before it, and a single query, or one that is not causal, sees all.
        scaling: factor on the scores; None means 1 / sqrt(D).

    Returns:
        [B, H, Tq, D], as a rule with T before H in memory.
    """
    causal, groups = causal and mask is None and query.shape[2] > 1, query.shape[1] // key.shape[1]
    on_gpu, flash = device_type(query.device) == "cuda", mask is None and runs_flash(query, key, value, dropout)
    if on_gpu and groups > 1 and not flash and query.shape[2] == 1:
        # the heads that share a key are as many queries of it, which see the same: nothing is copied
        together = query.unflatten(1, (-1, groups)).squeeze(3)
        if mask is None:  # which would hide from each what is behind it
            mask = query.new_zeros(1, key.shape[2])
        return fused_attention(together, key, value, mask, scaling, dropout).flatten(1, 2).unsqueeze(2)
    if on_gpu and groups > 1 and not flash:
        key, value, groups = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), 1
    if on_gpu and flash and causal and not dropout and torch.is_grad_enabled() and query.requires_grad:
        key_heads = key_heads_at_once(query, key)
        if key_heads < key.shape[1] and flash_takes(query, key, value, scaling):
            return _FewHeadsBackward.apply(query, key, value, scaling, key_heads)
    if query.is_meta and not dropout:
        # torch would take the formula, and no mode sees it choose; a CPU's fused kernel saves what a GPU's does
        if query.shape[3] != value.shape[3]:
            return _EFFICIENT(query, key, value, mask, True, dropout, causal, scale=scaling)[0]
        return _PLANNED(query, key, value, dropout, causal, attn_mask=mask, scale=scaling)[0]
    kernels = _kernels(query.dtype)
    with sdpa_kernel(kernels) if query.is_cuda else nullcontext():
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=groups > 1
        )


class PlannedKernels(TorchFunctionMode):
    """Have a plan's model that calls torch's attention or RMSNorm itself hold what the kernels hold that torch runs."""

    def during(self, module: nn.Module) -> None:
        """Do so in every forward of a module: a backward, where it may run again, has no mode that was entered."""
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(lambda *_: self._end(), always_call=True)  # where it raises, too

    def _begin(self) -> None:
        self.__enter__()

    def _end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _PLANNED_CALLS.get(func, func)(*args, **(kwargs or {}))


def _planned(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor:
    no_kernel = dropout_p or (query.shape[1] != key.shape[1] and not enable_gqa) or query.shape[3] != value.shape[3]
    if no_kernel:  # then torch takes the formula, as it does without values
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # kernels add theirs
        attn_mask = torch.where(
            attn_mask, torch.scalar_tensor(0.0, dtype=query.dtype, device=query.device), float("-inf")
        )
    return fused_attention(query, key, value, attn_mask, scale, causal=is_causal)


_PLANNED_CALLS = {scaled_dot_product_attention: _planned, rms_norm: planned_rms_norm, torch.rms_norm: planned_rms_norm}


class _FewHeadsBackward(torch.autograd.Function):
    """Causal flash attention whose backward runs over the query's heads of a few key heads at a time."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, key_heads):
        out, logsumexp, *_, seed, offset, _ = _FLASH(query, key, value, 0.0, True, scale=scaling)
        ctx.state = seed, offset
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.scaling, ctx.key_heads = scaling, key_heads
        return out

    @staticmethod
    def backward(ctx, grad_out):
        *tensors, logsumexp = ctx.saved_tensors
        length = grad_out.shape[2]

        def gradients(grad, query, key, value, out, heads: slice) -> tuple[torch.Tensor, ...]:
            inputs = grad, query, key, value, out, logsumexp[:, heads].contiguous()
            return _FLASH_BACKWARD(*inputs, None, None, length, length, 0.0, True, *ctx.state, scale=ctx.scaling)

        return *over_key_heads(ctx.key_heads, gradients, grad_out, *tensors), None, None


def over_key_heads(
    at_once: int, gradients: Callable[..., Sequence[torch.Tensor]], grad_out, query, key, value, out
) -> list[torch.Tensor]:
    """Return the gradients of query, key and value, found for a few key heads at a time; heads are dimension 1.

    Args:
        at_once: key heads.
        gradients: returns those of some heads, of whose tensors it is given views, and which of the query's they are.
    """
    found, groups = [torch.empty_like(tensor) for tensor in (query, key, value)], query.shape[1] // key.shape[1]
    for first in range(0, key.shape[1], at_once):
        of_key = slice(first, first + at_once)
        of_query = slice(groups * of_key.start, groups * of_key.stop)
        grad, q, o = (tensor[:, of_query] for tensor in (grad_out, query, out))
        parts = gradients(grad, q, key[:, of_key], value[:, of_key], o, of_query)
        for whole, heads, part in zip(found, (of_query, of_key, of_key), parts, strict=True):
            whole[:, heads] = part
    return found


def key_heads_at_once(query, key, rows: int | None = None) -> int:
    """Return over how many key heads a backward runs at once; for ``rows`` see ``flash_bytes``."""
    if torch.are_deterministic_algorithms_enabled():
        return key.shape[1]  # the fewer heads, the more sums of each
    groups = query.shape[1] // key.shape[1]
    share = query[:, :groups]
    taken = flash_bytes(share, groups, rows) + 2 * share.nbytes  # with copies of the results and their gradients
    return max(1, min(key.shape[1], MAX_SCRATCH_BYTES // max(1, taken)))


def _kernels(dtype: torch.dtype) -> list[SDPBackend]:
    return [kernel for kernel in KERNELS if kernel != SDPBackend.FLASH_ATTENTION or dtype != torch.float16]


def is_for_flash(query, value, dropout: float) -> bool:
    """Return whether flash attention takes heads of this kind, without a mask, on any GPU.

    Of heads between 192 and 224, and of wider ones with dropout, the GPUs of consumers have no backward.
    """
    size = query.shape[3]
    has_backward = size <= 192 or (size > 224 and not dropout)
    return query.dtype == torch.bfloat16 and size <= 256 and size == value.shape[3] and has_backward


def runs_flash(query, key, value, dropout: float) -> bool:
    """Return whether a GPU, this machine's if it has one, runs flash attention for heads of this kind without a
    mask."""
    sizes = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    kind = _asked_gpu(query), query.dtype, *sizes
    chosen = _chosen(*kind, False, dropout) if is_for_flash(query, value, dropout) else _MATH
    return chosen in (None, SDPBackend.FLASH_ATTENTION.value)


def has_kernel(query, key, value, masked: bool) -> bool:
    """Return whether a GPU runs a fused kernel for calls of this kind, without dropout; this machine's if it has
    one."""
    if not masked and runs_flash(query, key, value, 0.0):
        return True
    heads = query.shape[1]  # key heads are expanded to as many
    return _chosen(_asked_gpu(query), query.dtype, heads, heads, query.shape[3], value.shape[3], masked, 0.0) != _MATH


def kernel_of_gpu(dtype: torch.dtype) -> str | None:
    """Name what attends on this machine's GPU in a model like Llama-3.1-8B; None without a GPU."""
    gpu = torch.device("cuda")
    grouped, alone = (_chosen(gpu, dtype, 32, key_heads, 128, 128, False, 0.0) for key_heads in (8, 32))
    if grouped is None:
        return None
    if grouped == SDPBackend.FLASH_ATTENTION.value:
        return "flash attention"
    return "blocks of queries: torch has no fused kernel here" if alone == _MATH else "memory-efficient attention"


def _asked_gpu(tensor: torch.Tensor) -> torch.device:
    """Return the GPU that a tensor is on; for a plan's, the current one."""
    return tensor.device if tensor.is_cuda else torch.device("cuda")


@lru_cache
def _chosen(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    size: int,
    value_size: int,
    masked: bool,
    dropout: float,
) -> int | None:
    """Return which of KERNELS torch takes on a GPU of this machine for calls of a kind; None where there is none."""
    if not torch.cuda.is_available():
        return None
    shapes = (heads, size), (key_heads, size), (key_heads, value_size)
    options = {"dtype": dtype, "device": device, "requires_grad": True}
    # views of one row each: a plan may be counting what is allocated
    tensors = [torch.empty(1, 1, 1, size, **options).expand(1, heads, _ASKED_TOKENS, size) for heads, size in shapes]
    mask = torch.zeros(_ASKED_TOKENS, _ASKED_TOKENS, dtype=dtype, device=device) if masked else None
    with sdpa_kernel(_kernels(dtype)):
        return torch._fused_sdp_choice(*tensors, mask, dropout, not masked, enable_gqa=heads != key_heads)


def flash_takes(query, key, value, scaling) -> bool:
    """Return whether torch would run flash attention, and as it is: other sizes of a head are filled up first."""
    if query.shape[3] % 8:
        return False
    if not query.is_cuda:  # in a plan, for which ``runs_flash`` has said it
        return True
    grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel(KERNELS):
        chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, True, scale=scaling, enable_gqa=grouped)
    return chosen == SDPBackend.FLASH_ATTENTION.value


def scratch_bytes(grad_out, query, key, value, *_others, attn_mask=None, **_unused) -> int:
    """Return the bytes of scratch memory of a GPU's backward, given the arguments of one of ``BACKWARDS``.

    Flash attention's takes results, which lie in memory as the queries do, and their gradients with T before H; what
    lies otherwise is copied.
    """
    if attn_mask is not None or not runs_flash(query, key, value, 0.0):
        return _efficient_bytes(query, key)
    copied = sum(tensor.nbytes for tensor in (query, grad_out) if not tensor.transpose(1, 2).is_contiguous())
    return flash_bytes(query, query.shape[1] // key.shape[1]) + copied


def flash_bytes(query, groups: int, rows: int | None = None) -> int:
    """Return the bytes that flash attention's backward takes for a query [B, H, T, D] with H / groups key heads.

    Args:
        rows: tokens that it makes room for, None where they are T rounded up.
    """
    batch, heads, length, size = query.shape
    rows, numbers = rows or _up(length, _ROWS), _up(size, 32) if size <= 192 else 256
    sums = 1  # of the query's gradient, float32
    if torch.are_deterministic_algorithms_enabled():
        sums = -(-_MAX_PROCESSORS // (batch * heads))
    taken = 4 * batch * heads * rows * (1 + sums * numbers)  # with what the gradients of the scores have in common
    if groups > 1:  # the gradients of key and value for each head of the query, before they are added up
        taken += 2 * query.nbytes
    return taken


def _efficient_bytes(query, key) -> int:
    """Return the bytes that the memory-efficient kernel's backward takes for a query [B, H, T, D], in float32 sums.

    Of the query's gradient; of those of key and value where heads are wider than the kernel's tile, for as many pieces
    of the keys as it runs at a time. In float16 the tile is taken for the smaller of two: the larger may be too large
    for a Turing GPU.
    """
    batch, heads, length, size = query.shape
    numbers = _up(length, _ROWS) * (1 + _up(size, _PIECE))
    if query.dtype != torch.float32 and size > (_PIECE if query.dtype == torch.float16 else _ROWS):
        pieces = min(-(-key.shape[2] // _PIECE), max(1, _PIECES_AT_ONCE // (batch * heads)))
        numbers += 2 * pieces * _PIECE * _up(size, _ROWS)
    return 4 * batch * heads * numbers


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
