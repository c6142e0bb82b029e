"""Attention with capped scores or sinks in one call, by a kernel that torch compiles on a GPU.

Flash attention knows neither, and ``block_attention`` takes some ten launches for every 128 queries of a sequence.
``torch.nn.attention.flex_attention`` writes the cap into a Triton kernel, and which keys a token sees; a sink takes its
share of the weights afterwards: ``out * sigmoid(logsumexp - sink)``. Its scores stay in float32.

Of each token the kernel is told the first key that it sees. That says both the window and where its sequence begins, so
that layers with a window and without share one graph. Which blocks of queries see which blocks of keys follows from the
lengths alone: the tables are made on the host, once for the layers of a kind, and copied; torch's ``create_block_mask``
would hold the square of all tokens on the GPU.

A graph is dynamic along the tokens, and so serves every micro-batch; the cap and the scale are constants in it. There
is one for values and one for gradients of each kind of heads. Up to ``BLOCK`` tokens, for which torch would compile
others, ``block_attention`` takes few launches anyway.

torch offers no part of its backward, so that gradients begin with the values once more: of a block that is computed
again 13 parts of work where 11 would do (``memory.work``), and nothing is kept but the inputs. That a plan and a ledger
see what happens, either direction is an operator of our own, in which no mode keeps torch's compiler out.

No GPU has run this: a run takes it where a trial of its own shapes found it better (``train.kernels``).

Shapes: T tokens of all sequences, H heads, K key heads, D a head's size, N = T / BLOCK, rounded up.
Source of the scratch, and of sizes: flex_attention.py of torch's _inductor/kernel/flex, and its templates; read for
torch 2.13.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch.nn.attention import flex_attention as torchs

from qlora_lite.memory.shapes import device_type, has_triton
from qlora_lite.memory.work import FLOP_FORMULAS
from qlora_lite.offload.compiled import MAX_GRAPHS, as_outside
from qlora_lite.offload.transfer import sent

log = logging.getLogger(__name__)

BLOCK = 128  # queries, and keys, of a block that is computed or left out; a multiple of the kernel's tiles
SIZES = range(16, 257)  # of a head: tl.dot's least, and what a GPU's shared memory has room for
# Tiles of the gradients' kernel: torch's own take 112 KiB of shared memory for heads over 128, which GeForce GPUs and
# their siblings (8.6, 8.9, 12.0: 99 KiB) have not; these take 48 KiB of it for heads of 256.
SMALL_TILES = {"bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 16, "bwd_num_stages": 1}
TORCHS_TILES_BYTES = 112 << 10
KINDS = 2  # of layers, with a window and without, whose tables are kept


def kernel_takes(query, key, value, row_lengths: Sequence[int]) -> bool:
    """Return whether a GPU can have the kernel for sequences of these lengths."""
    batch, _, tokens, size = query.shape
    if device_type(query.device) != "cuda" or not has_triton():
        return False
    return batch == 1 and BLOCK < sum(row_lengths) == tokens and size in SIZES and size == value.shape[3]


def flex_attention(query, key, value, row_lengths, scaling=None, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """Attend causally within each sequence; arguments and result are those of ``block_attention``.

    Sinks are frozen here too. See ``kernel_takes``.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D], H a multiple of K.
        row_lengths: tokens of each sequence, T in all.

    Returns:
        [1, T, H, D], contiguous.
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    window = None if window is None or window >= max(row_lengths) else window
    out = _values(query, key, value, sinks, row_lengths, float(scaling), window, float(softcap) if softcap else None)
    return out.transpose(1, 2).contiguous()


@torch.library.custom_op("qlora_lite::flex_attention", mutates_args=())
def _values(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    row_lengths: Sequence[int],
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    with as_outside(), torch.no_grad():
        return _attend((query.detach(), key.detach(), value.detach()), sinks, row_lengths, scaling, window, softcap)


@_values.register_fake
def _(query, key, value, sinks, row_lengths, scaling, window, softcap):
    return torch.empty_like(query)


@torch.library.custom_op("qlora_lite::flex_attention_gradients", mutates_args=())
def _gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    row_lengths: Sequence[int],
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with as_outside(), torch.enable_grad():
        out = _attend(inputs, sinks, row_lengths, scaling, window, softcap)
        return torch.autograd.grad(out, inputs, grad_out)


@_gradients.register_fake
def _(grad_out, query, key, value, sinks, row_lengths, scaling, window, softcap):
    return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _go_back(ctx, grad_out):
    return *_gradients(grad_out, *ctx.saved_tensors, *ctx.settings), *(None,) * 5


_values.register_autograd(_go_back, setup_context=_keep_inputs)


def _attend(tensors, sinks, row_lengths, scaling: float, window: int | None, softcap: float | None) -> torch.Tensor:
    """Call the compiled function, of one graph for all numbers of tokens."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    device, shared_bytes = tensors[0].device, TORCHS_TILES_BYTES
    if device.type == "cuda":
        shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    tables, options = _tables(tuple(row_lengths), window, device), kernel_options(tensors[0].shape[3], shared_bytes)
    # a float that differs from the last one's would become a variable of the graph, which the kernel does not take
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=MAX_GRAPHS):
        return _compiled()(*tensors, sinks, *tables, scaling, softcap, options)


def kernel_options(size: int, shared_bytes: int) -> dict[str, int]:
    """Return what to tell torch of the kernels for heads of a size on a GPU with so much shared memory a block."""
    return SMALL_TILES if size > 128 and shared_bytes < TORCHS_TILES_BYTES else {}


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    log.info("attention: torch compiles flex attention, which takes a minute or so the first time")
    return torch.compile(_flex, fullgraph=True)


def _flex(query, key, value, sinks, first_keys, tables: Sequence[torch.Tensor], scaling, softcap, options):
    def sees(batch, head, query_at, key_at):
        return (key_at <= query_at) & (key_at >= first_keys[query_at])

    def capped(score, batch, head, query_at, key_at):
        return torch.tanh(score / softcap) * softcap

    tokens = query.shape[2]
    mask = torchs.BlockMask((tokens, tokens), *tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)
    how = {
        "score_mod": capped if softcap else None,
        "block_mask": mask,
        "scale": scaling,
        "enable_gqa": True,
        "kernel_options": options,
    }
    if sinks is None:
        return torchs.flex_attention(query, key, value, **how)
    out, beside = torchs.flex_attention(query, key, value, return_aux=torchs.AuxRequest(lse=True), **how)
    return (out * torch.sigmoid(beside.lse - sinks[:, None])[..., None]).to(out.dtype)


@lru_cache(KINDS)
def _tables(row_lengths: tuple[int, ...], window: int | None, device: torch.device):
    """Return each token's first key, int32 [T], and the eight tables of a ``BlockMask`` in its order: of the blocks
    that are seen in part, and of whole ones, how many and which, for queries and for keys."""
    seen, whole = seen_blocks(row_lengths, window)
    listed = [part for blocks in (seen & ~whole, whole) for part in _listed(blocks)]
    mask = torchs.BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=BLOCK)
    tables = (
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        mask.q_num_blocks,
        mask.q_indices,
        mask.full_q_num_blocks,
        mask.full_q_indices,
    )
    first_keys, *there = (sent(tensor, device) for tensor in (_first_keys(row_lengths, window), *tables))
    for tensor, begin in ((first_keys, 0), *((table, 2) for table in there)):
        for dimension in range(begin, tensor.ndim):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return first_keys, there


def _first_keys(row_lengths: Sequence[int], window: int | None) -> torch.Tensor:
    lengths = torch.tensor(row_lengths)
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    if window is not None:
        first = torch.maximum(first, torch.arange(len(first)) - window + 1)
    return first.int()


def seen_blocks(row_lengths: Sequence[int], window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which blocks of keys those of queries see, and see whole, bool [N, N]; no token's first key comes before
    that of an earlier one."""
    first_keys = _first_keys(row_lengths, window)
    tokens, start = len(first_keys), torch.arange(0, len(first_keys), BLOCK)
    end, queries = start + BLOCK - 1, start[:, None]
    seen = (start <= queries) & (end >= first_keys[queries])
    whole = (start < queries) & (start >= first_keys[end.clamp(max=tokens - 1)][:, None]) & (end < tokens)[:, None]
    return seen, whole


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many blocks of keys each one of queries has, int32 [1, 1, N], and which, first of [1, 1, N, N]."""
    numbers = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], numbers.int()[None, None]


def scratch_bytes(query, _key, _value, sinks, *_settings) -> int:
    """Return the bytes of scratch memory of the values' operator, given its arguments.

    At most four float32 numbers of each query (the logsumexp, the largest score, and what backward sums), the tables,
    and the values before sinks.
    """
    blocks = -(-query.shape[2] // BLOCK)
    tables = KINDS * 4 * (4 * blocks * (blocks + 1) + query.shape[2])
    return (sinks is not None) * query.nbytes + 4 * 4 * query.shape[:3].numel() + tables


def gradients_scratch_bytes(grad_out, query, *others) -> int:
    """Return the bytes of scratch memory of the gradients' operator, given its arguments.

    Beside that of the values, these, and their gradient before sinks and in the order of the query.
    """
    tensors = 1 + (others[2] is not None) + (grad_out.stride() != query.stride())
    return scratch_bytes(query, *others) + tensors * query.nbytes


@lru_cache(64)
def _computed_scores(row_lengths: tuple[int, ...], window: int | None) -> int:
    """Return how many scores of a head the kernel computes: those of whole blocks."""
    return int(seen_blocks(row_lengths, window)[0].sum()) * BLOCK**2


def _flops(first: int, of_keys: int, of_values: int) -> Callable[..., int]:
    """Return the formula of an operator whose query is the argument of that number; see ``memory.work``."""

    def flops(*args, **_unused) -> int:
        query, _, value, _, row_lengths, _, window, _ = args[first:]
        scores = _computed_scores(tuple(row_lengths), window) * query.shape[1]
        return 2 * scores * (of_keys * query.shape[3] + of_values * value.shape[3])

    return flops


VALUES, GRADIENTS = torch.ops.qlora_lite.flex_attention, torch.ops.qlora_lite.flex_attention_gradients  # operators
# Gradients: the values again; then scores and their gradients twice, for the query and for key and value.
FLOP_FORMULAS[VALUES] = _flops(0, 1, 1)
FLOP_FORMULAS[GRADIENTS] = _flops(1, 1 + 4, 1 + 3)
