"""Attention over packed sequences, each seeing only itself: causal, and an encoder's (``encoder_attention``).

Training batches hold no padding: their rows are concatenated along the token axis and the row lengths
travel beside them. Attending row by row is exact for every row, costs no more than the rows alone (a
block-diagonal mask over the whole batch costs its length squared), and needs no kernel that a CPU lacks. A GPU may
have one for all rows in one call (``packed_attention``, and ``flex_attention`` for capped scores and sinks), which is
taken where training allows it.

In a window a token sees itself and a fixed number of tokens before it. Given a mask over a whole row, a fused kernel
computes what the mask hides, and the mask alone takes the square of the row's length. So a row is cut into chunks as
long as the window. A chunk sees itself and the chunk before, so that all whole chunks are one call with one small mask
between them; time and memory grow with the length of the row.

Without row lengths (generation with a key/value cache) the mask that transformers built is used; without a
mask either, each sequence of the batch is one row.

Shapes: query [B, H, T, D], key and value [B, K, T, D] with H a multiple of K (grouped-query attention);
result [B, T, H, D].
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.memory.shapes import device_type, kernel_rows
from qlora_lite.offload.checkpoint import running
from qlora_lite.offload.compiled import as_outside

from .block_attention import block_attention, block_gradients
from .encoder_attention import encoder_attention
from .flex_attention import flex_attention
from .flex_attention import kernel_takes as flex_takes
from .fused_attention import fused_attention, has_kernel
from .kept_attention import kept_attention
from .packed_attention import kernel_takes, packed_attention
from .picture_attention import seeing_pictures

FORMULA_TOKENS = 256  # of a row, whose scores take little even for all heads at once
_MASK_MULTIPLE = 16  # entries, of a mask's rows in memory: a GPU's kernel copies others


class Rows(NamedTuple):
    """What is attended to, and how."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None  # bool or additive float [B, 1, Tq, Tk]; used only without lengths
    scaling: float | None  # factor on the scores; None means 1 / sqrt(D)
    dropout: float
    window: int | None  # a token sees itself and this many minus one before it; None for all
    softcap: float | None  # scores become softcap * tanh(scores / softcap) (Gemma-2); None for off
    sinks: torch.Tensor | None  # [H], a score per head that takes weight and gives nothing (gpt-oss); None for off
    lengths: Sequence[int]  # tokens in each row; none with a mask, a tensor under torch.compile; filler may follow
    ends: torch.Tensor | None  # of rows (``packed_attention.sequence_ends``), if a GPU may take all in one call
    flex: bool  # a GPU may attend with capped scores or sinks in one call (``flex_attention``)
    pictures: (
        tuple[Sequence[int], Sequence[int], bool] | None
    )  # first tokens, sizes, and if in layers with a window only
    is_causal: bool  # not an encoder's

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    @property
    def within(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], float | None, int | None]:
        return self.query, self.key, self.value, self.lengths, self.scaling, self.window

    @property
    def is_special(self) -> bool:  # capped scores or sinks, which torch's fused kernels do not know
        return self.is_causal and (bool(self.softcap) or self.sinks is not None)

    @property
    def see_pictures(self) -> bool:  # all of a picture, and not only the tokens before
        return self.is_causal and self.pictures is not None and (self.window is not None or not self.pictures[2])

    @property
    def are_on_cpu(self) -> bool:
        return device_type(self.query.device) == "cpu"


def row_attention(
    module: nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    row_lengths: Sequence[int] | None = None,
    row_ends: torch.Tensor | None = None,
    row_flex: bool = False,
    row_pictures: tuple[Sequence[int], Sequence[int], bool] | None = None,
    row_windows: tuple[Collection[nn.Module], Sequence[int]] | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Attend within each row, causally if the layer does not say otherwise; the arguments are those of ``Rows``.

    Args:
        module: the attention layer, as in transformers' attention interface; ``is_causal`` False is an encoder's.
        attention_mask: None or empty for none.
        s_aux: attention sinks.
        row_windows: layers of a vision tower that attend within windows, and the tokens of each window, in order.

    Returns:
        The attended values [B, T, H, D] and None in place of attention weights.

    Raises:
        ModelError: dropout, or pictures whose tokens see all of them, beside capped scores or sinks.
    """
    is_causal, length = getattr(module, "is_causal", True), query.shape[2]
    if not is_causal and row_windows is not None and module in row_windows[0]:
        row_lengths = row_windows[1]
    if row_lengths is None:
        has_mask = attention_mask is not None and attention_mask.numel()  # empty: a block that gets no row_lengths
        if not has_mask:
            attention_mask = None
        row_lengths = () if has_mask or (is_causal and length != key.shape[2]) else (length,)
    how = scaling, dropout, sliding_window, softcap, s_aux
    rows = Rows(query, key, value, attention_mask, *how, row_lengths, row_ends, row_flex, row_pictures, is_causal)
    if rows.dropout and rows.is_special:
        raise ModelError(
            "dropout of attention's weights is not known here beside capped scores or sinks: set "
            "attention_dropout to 0 in the model's config.json"
        )
    if rows.see_pictures and (rows.is_special or rows.dropout):
        raise ModelError(
            "pictures whose tokens see all of them are not known here beside capped scores, sinks or "
            "dropout of attention's weights; choose another model"
        )
    return _attend(rows), None


def _attend(rows: Rows) -> torch.Tensor:
    return next(attend for takes, attend in KERNELS if takes(rows))(rows)


def _around_pictures(rows: Rows) -> torch.Tensor:
    begins, sizes, _ = rows.pictures or ((), (), False)
    return seeing_pictures(_attend(rows._replace(pictures=None)), *rows.tensors, begins, sizes, *rows.within[3:])


def _with_mask(rows: Rows) -> torch.Tensor:
    if rows.is_special:
        out = _written_out(*rows.tensors, rows.mask, rows.scaling, rows.softcap, rows.sinks)
    else:
        out = _fused(*rows.tensors, rows.mask, rows.scaling, rows.dropout)
    return out.transpose(1, 2).contiguous()


def _compiled(rows: Rows) -> torch.Tensor:
    return _rows_operator(*rows.tensors, rows.lengths, rows.sinks, rows.scaling, rows.window, rows.softcap)


def _by_flex(rows: Rows) -> torch.Tensor:
    how = *rows.within[3:], rows.softcap, rows.sinks
    return kept_attention(lambda query, key, value: flex_attention(query, key, value, *how), *rows.tensors)


def _in_blocks(rows: Rows) -> torch.Tensor:
    fused = not rows.is_special and rows.are_on_cpu and _fused_is_faster(rows.query.dtype, rows.lengths, rows.window)
    attend = partial(row_by_row, *rows.within, rows.dropout) if fused else None
    return block_attention(*rows.within, rows.softcap, rows.sinks, attend)


def _fit_packed_kernel(rows: Rows) -> bool:
    if rows.ends is None or rows.dropout:
        return False
    # one row alone is a fused kernel's own case
    alone = len(rows.lengths) == 1 and (rows.window is None or rows.window >= rows.query.shape[2])
    return not alone and kernel_takes(*rows.tensors, rows.lengths)


def _all_at_once(rows: Rows) -> torch.Tensor:
    attend = partial(packed_attention, ends=rows.ends, lengths=rows.lengths, scaling=rows.scaling, window=rows.window)
    return kept_attention(attend, *rows.tensors).transpose(1, 2).contiguous()


# What takes rows, and attends to them: the first that does.
KERNELS: tuple[tuple[Callable[[Rows], bool], Callable[[Rows], torch.Tensor]], ...] = (
    (lambda rows: rows.see_pictures, _around_pictures),
    (lambda rows: len(rows.lengths) == 0, _with_mask),
    (lambda rows: not rows.is_causal, lambda rows: encoder_attention(*rows.within, rows.dropout)),
    (lambda _: torch.compiler.is_compiling(), _compiled),
    (lambda rows: rows.is_special and rows.flex and flex_takes(*rows.tensors, rows.lengths), _by_flex),
    (lambda rows: rows.is_special or (rows.are_on_cpu and not rows.dropout), _in_blocks),
    (_fit_packed_kernel, _all_at_once),
    (lambda rows: not rows.dropout and _by_blocks(*rows.tensors, rows.lengths, rows.window), _in_blocks),
    (lambda _: True, lambda rows: row_by_row(*rows.within, rows.dropout)),
)


def _by_blocks(query, key, value, row_lengths: Sequence[int], window: int | None) -> bool:
    """Return whether a GPU has no fused kernel for long rows: the formula would take the square of their length."""
    longest = max(row_lengths)
    if longest <= FORMULA_TOKENS or query.shape[3] != value.shape[3]:
        return False
    kinds = (False, True) if window is not None and window < longest else (False,)
    return not all(has_kernel(query, key, value, masked) for masked in kinds)


def row_by_row(query, key, value, row_lengths, scaling, window, dropout) -> torch.Tensor:
    """Attend within one row after the other with fused kernels; return [B, T, H, D]."""
    attend = partial(_fused, scaling=scaling, dropout=dropout)
    outs, start, length = [], sum(row_lengths), query.shape[2]
    for row_length, q, k, v in zip(row_lengths, *_cut(row_lengths, query, key, value), strict=True):
        outs.append(window_attention(attend, q, k, v, window)[:, :row_length])
    if start < length:
        outs.append(query.new_zeros(query.shape[0], length - start, query.shape[1], value.shape[3]))
    return outs[0].contiguous() if len(outs) == 1 else torch.cat(outs, dim=1)


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
        like: a query. For a GPU's, the mask is additive and of its type, which its kernel would make of another.

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


def _cut(row_lengths, *tensors) -> list[Sequence[torch.Tensor]]:
    """Return the rows of each tensor, long enough for the device's kernels.

    Where they need no more than the rows have, backward joins the gradients of all; of slices it would add up tensors
    of the whole length. Extra tokens up to the kernel's length are those of the next row: causal attention keeps the
    row from seeing them, and their own results are dropped.
    """
    length, device = tensors[0].shape[2], tensors[0].device
    whole = [kernel_rows(row_length, device) for row_length in row_lengths]
    if whole == [length]:
        return [[tensor] for tensor in tensors]
    if whole == [*row_lengths]:
        return [tensor.split([*whole, length - sum(whole)], dim=2)[: len(whole)] for tensor in tensors]
    starts = accumulate(row_lengths[:-1], initial=0)
    seen = [slice(start, start + count) for start, count in zip(starts, whole, strict=True)]
    return [[tensor[:, :, places] for places in seen] for tensor in tensors]


def _fused_is_faster(dtype: torch.dtype, row_lengths: Sequence[int], window: int | None) -> bool:
    """Return whether a CPU's fused kernel gets at the values sooner than ``block_attention`` by itself.

    With a matrix unit (AMX) it does. A window takes that back: the kernel computes what the mask hides.
    """
    windowed = window is not None and window < max(row_lengths)
    return dtype == torch.bfloat16 and not windowed and torch.cpu.get_capabilities().get("amx_bf16", False)


def _fused(query, key, value, mask, scaling, dropout):
    attend = partial(fused_attention, mask=mask, scaling=scaling, dropout=dropout)
    if dropout or device_type(query.device) == "cpu":  # block_attention keeps its own
        return attend(query, key, value)
    return kept_attention(attend, query, key, value)


def _written_out(query, key, value, mask, scaling, softcap, sinks):
    """Attend with capped scores or sinks and a mask that was made elsewhere, the scores of all heads in memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[2]] @ value


# Attention over rows as one operator, for torch.compile: its loops follow the lengths of a batch's rows.


@torch.library.custom_op("qlora_lite::row_attention", mutates_args=())
def _rows_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    out = _attended(query, key, value, row_lengths, sinks, scaling, window, softcap)
    # of its own, since a block's first run keeps the result and a compiler may write to it
    return out.clone(memory_format=torch.contiguous_format)


def _attended(query, key, value, row_lengths, sinks, scaling, window, softcap) -> torch.Tensor:
    lengths = _lengths(row_lengths)
    return row_attention(None, query, key, value, None, scaling, 0.0, window, softcap, sinks, lengths)[0]


def _lengths(row_lengths: torch.Tensor) -> tuple[int, ...]:
    return tuple(length for length in row_lengths.tolist() if length)  # see ``compiled.lengths_tensor``


@_rows_operator.register_fake
def _(query, key, value, row_lengths, sinks, scaling, window, softcap):
    return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3])


@torch.library.custom_op("qlora_lite::row_attention_gradient", mutates_args=())
def _gradient_operator(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths, no_kernel = _lengths(row_lengths), sinks is not None or softcap
    if device_type(query.device) == "cpu" or no_kernel or _by_blocks(query, key, value, lengths, window):
        return block_gradients(query, key, value, grad, lengths, scaling, window, softcap, sinks)

    q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    with running(None), as_outside(), torch.enable_grad():
        grads = torch.autograd.grad(_attended(q, k, v, row_lengths, None, scaling, window, None), (q, k, v), grad)
    return tuple(grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)  # laid out token by token


@_gradient_operator.register_fake
def _(grad, query, key, value, row_lengths, sinks, scaling, window, softcap):
    return tuple(tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in (query, key, value))


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _gradients(ctx, grad):
    return *_gradient_operator(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


_rows_operator.register_autograd(_gradients, setup_context=_keep_inputs)
