"""Pack a weight into 4-bit NF4 or FP4 blocks and dequantise it, byte for byte as bitsandbytes stores them.

A weight is cut, row-major, into blocks of 64. A block keeps its largest magnitude (`absmax`, float32) and,
for each weight, the number of the table entry nearest to weight / absmax; two numbers share a byte, the first
in the high half. Double quantisation then keeps the absmax values minus their mean in 8 bits, in blocks of
256: 4.127 bits a weight, not 4.5. Source: QLoRA (arXiv 2305.14314), section 3.

Packed weights are plain tensors, not bitsandbytes' `QuantState` or `Params4bit`: they can be buffers, be
saved for backward, be streamed and be on the meta device. Its operators do the dequantisation, and on a GPU the
packing.

Packing on a CPU is done here, because the operator looks up each weight by binary search, whose branches no
processor predicts. Here a weight's number is a count: how many of the 15 borders between table entries lie
below it. That is 15 vector compares and a sum, in chunks that stay in the cache. The compares are numpy's,
since torch's are slow when their result is bool. ``tools/bench/load`` times a whole checkpoint, packed here and by the
operator; ``tests/quant/test_nf4.py`` compares the bytes of both.

Shapes: `codes` uint8 [ceil(weights / 2), 1]; blocks = ceil(weights / 64); `absmax` [blocks].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lite.errors import ModelError

from .bnb import functional as bnb

BLOCK_SIZE = 64  # weights that share one absmax
ABSMAX_BLOCK_SIZE = 256  # absmax values that share one scale under double quantisation
_SMALLEST_ABSMAX = 1e-38  # bitsandbytes' guard against dividing by zero
_CHUNK_WEIGHTS = 1 << 18  # a chunk needs 25 bytes a weight, 6.5 MiB; smaller ones pay more for calls
MAX_KERNEL_WEIGHTS = 1 << 30  # whole blocks; bitsandbytes' CUDA functions count in int32, and more wraps without error
_FEW_CHUNKS = 4  # new threads, and their first memory, cost as much as two
_MAX_THREADS = 8  # bounds the memory of all chunks at work


class Packed(NamedTuple):
    """Hold one weight in 4 bits; the last three fields are None without double quantisation."""

    codes: Tensor  # uint8 [ceil(weights / 2), 1]
    absmax: Tensor  # float32 [blocks]; uint8 [blocks] under double quantisation
    absmax_code: Tensor | None = None  # float32 [256], what each uint8 stands for
    absmax_scale: Tensor | None = None  # float32 [ceil(blocks / 256)]
    absmax_offset: Tensor | None = None  # float32 [], mean of the absmax values


def quantize(weight: Tensor, quant_type: str = "nf4", double_quant: bool = True) -> Packed:
    """Pack a weight, equal in every byte to bitsandbytes' `quantize_4bit`.

    Args:
        weight: bfloat16, float16 or float32, any shape, not empty. Only a non-contiguous one is copied whole.
        quant_type: "nf4" or "fp4".
        double_quant: also store the absmax values in 8 bits.

    Returns:
        The packed weight, on the device of `weight`. Extra memory on a CPU stays under 64 MiB.

    Raises:
        ModelError: the weight holds NaN or infinity, is empty or has another dtype.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.numel() == 0:
        raise ModelError(f"cannot quantise a weight of {weight.dtype} and shape {tuple(weight.shape)}")
    flat = weight.detach().reshape(-1)
    if not torch.stack(torch.aminmax(flat)).isfinite().all():
        wide = "" if flat.dtype != torch.float16 else ", or its numbers are beyond float16: set another compute type"
        raise ModelError(f"cannot quantise a weight that holds NaN or infinity: the checkpoint is damaged{wide}")
    if flat.device.type == "cpu":
        codes, absmax = _quantize_on_cpu(flat, quant_type)
    else:
        codes, absmax = _quantize_by_kernel(flat, quant_type)
    if not double_quant:
        return Packed(codes, absmax)
    offset = absmax.mean()
    code = bnb.create_dynamic_map().to(absmax.device)
    absmax, scale = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, code, ABSMAX_BLOCK_SIZE)
    return Packed(codes, absmax, code, scale, offset)


def empty_packed(shape: Sequence[int], double_quant: bool, device: torch.device | str) -> Packed:
    """Allocate the parts of a packed weight without values, to be filled, or on "meta" to be counted.

    Args:
        shape: the weight's shape before packing.
        double_quant: as in `quantize`.
        device: where.

    Returns:
        A `Packed` whose parts have the dtypes and shapes that `quantize` returns.
    """
    weights = prod(shape)
    blocks = -(-weights // BLOCK_SIZE)
    codes = torch.empty(-(-weights // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
    if not double_quant:
        return Packed(codes, absmax)
    sizes = (256,), (-(-blocks // ABSMAX_BLOCK_SIZE),), ()
    return Packed(codes, absmax, *(torch.empty(size, dtype=torch.float32, device=device) for size in sizes))


def dequantize(packed: Packed, shape: Sequence[int], dtype: torch.dtype, quant_type: str = "nf4") -> Tensor:
    """Dequantise a weight: table entry times absmax, computed in float32 and rounded once to `dtype`.

    The operator gets rows of one block, or all in one row. Given the real shape, the CPU kernel of
    bitsandbytes 0.50 takes wrong absmax values when the last dimension is a multiple of 16 but not of 64,
    and compiles code at run time when it is odd.

    Args:
        packed: from `quantize`.
        shape: the weight's shape before packing.
        dtype: bfloat16, float16 or float32.
        quant_type: the one the weight was packed with.

    Returns:
        The weight, contiguous.
    """
    weights = prod(shape)
    if weights > MAX_KERNEL_WEIGHTS:
        values, absmax = torch.empty(weights, dtype=dtype, device=packed.codes.device), absmax_of(packed)
        for start in range(0, weights, MAX_KERNEL_WEIGHTS):
            stop = start + MAX_KERNEL_WEIGHTS
            piece = values[start:stop]
            some = Packed(packed.codes[start // 2 : stop // 2], absmax[start // BLOCK_SIZE : stop // BLOCK_SIZE])
            piece.copy_(dequantize(some, piece.shape, dtype, quant_type))
        return values.view(tuple(shape))
    rows = (weights // BLOCK_SIZE, BLOCK_SIZE) if weights % BLOCK_SIZE == 0 else (1, weights + weights % 2)
    values = torch.ops.bitsandbytes.dequantize_4bit(
        packed.codes, absmax_of(packed), BLOCK_SIZE, quant_type, rows, dtype
    )
    if values.numel() > weights:
        values = values.view(-1)[:weights]
    return values.view(tuple(shape))


def absmax_of(packed: Packed) -> Tensor:
    """Return the largest magnitude of each block, float32 [blocks]."""
    if packed.absmax_code is None:
        return packed.absmax
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        packed.absmax, packed.absmax_scale, packed.absmax_code, ABSMAX_BLOCK_SIZE, torch.float32
    )
    return absmax + packed.absmax_offset


def dequantize_rows(
    packed: Packed, shape: Sequence[int], rows: slice | Tensor, dtype: torch.dtype, quant_type: str = "nf4"
) -> Tensor:
    """Dequantise some rows of a weight: `dequantize(packed, shape, dtype, quant_type)[rows]`, without the others.

    Args:
        packed: from `quantize`.
        shape: the weight's shape before packing, [out, in], whole blocks in a row.
        rows: slice, or numbers int64 [n].
        dtype: bfloat16, float16 or float32.
        quant_type: the one the weight was packed with.
    """
    out_features, in_features = shape
    codes = packed.codes.view(out_features, -1)[rows]
    absmax = packed.absmax.view(out_features, -1)[rows]
    code, scale, offset = packed[2:]
    if code is not None and scale is not None and offset is not None:
        numbers = torch.arange(out_features, device=codes.device)[rows]
        blocks = numbers[:, None] * absmax.shape[1] + torch.arange(absmax.shape[1], device=codes.device)
        absmax = code[absmax.long()] * scale[blocks // ABSMAX_BLOCK_SIZE] + offset
    some = Packed(codes.reshape(-1, 1), absmax.reshape(-1))
    return dequantize(some, (codes.shape[0], in_features), dtype, quant_type)


def quantize_reference(weight: Tensor, quant_type: str = "nf4", double_quant: bool = True) -> Packed:
    """Do what `quantize` does on a CPU, in plain torch; slow, and with many times the weight's memory."""
    values = weight.detach().reshape(-1).float()
    blocks = F.pad(values, (0, -len(values) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1)
    if len(values) % BLOCK_SIZE:  # in an incomplete block bitsandbytes divides, and keeps the clamped absmax
        absmax[-1].clamp_(min=_SMALLEST_ABSMAX)
        scaled[-1] = blocks[-1] / absmax[-1]
    borders, order = _borders_and_order(quant_type)
    numbers = order[torch.bucketize(scaled, borders)].to(torch.uint8).view(-1)
    numbers = numbers[: len(values) + len(values) % 2]
    codes = (numbers[::2] << 4 | numbers[1::2]).unsqueeze(1)
    if not double_quant:
        return Packed(codes, absmax)

    offset = absmax.mean()
    code = bnb.create_dynamic_map()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % ABSMAX_BLOCK_SIZE)).view(-1, ABSMAX_BLOCK_SIZE)
    scale = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / scale).unsqueeze(1)).clamp(-1, 1)
    on_grid = ((scaled + 1) * 0.5 * 65535 + 0.5).floor() / 65535 * 2 - 1  # the CPU kernel's first rounding
    numbers = torch.bucketize(on_grid, (code[:-1] + code[1:]) / 2)
    numbers[scale == 0] = 0
    return Packed(codes, numbers.to(torch.uint8).view(-1)[: len(absmax)], code, scale, offset)


def to_bnb_state(
    packed: Packed, shape: Sequence[int], dtype: torch.dtype, quant_type: str = "nf4"
) -> dict[str, Tensor]:
    """Name the parts of a packed weight as bitsandbytes does in a checkpoint.

    Args:
        packed: from `quantize`.
        shape: the weight's shape before packing.
        dtype: the one that readers dequantise to.
        quant_type: the one the weight was packed with.

    Returns:
        Tensors by key, relative to the weight's own: "" (the codes), "absmax", "quant_map", "nested_absmax",
        "nested_quant_map", "quant_state.bitsandbytes__nf4" (JSON as bytes).
    """
    nested = None
    if packed.absmax_code is not None:
        nested = bnb.QuantState(
            packed.absmax_scale, code=packed.absmax_code, blocksize=ABSMAX_BLOCK_SIZE, dtype=torch.float32
        )
    table = bnb.get_4bit_type(quant_type, device=packed.codes.device)
    state = bnb.QuantState(
        packed.absmax, torch.Size(shape), table, BLOCK_SIZE, quant_type, dtype, packed.absmax_offset, nested
    )
    return {"": packed.codes, **state.as_dict(packed=True)}


def from_bnb_state(state: Mapping[str, Tensor]) -> tuple[Packed, tuple[int, ...], torch.dtype, str]:
    """Read what `to_bnb_state` or bitsandbytes wrote.

    Args:
        state: tensors by the keys that `to_bnb_state` returns.

    Returns:
        The packed weight, its shape before packing, the dtype to dequantise to and the quantisation type.

    Raises:
        ModelError: a part is missing or damaged, or the block sizes or the table are not the usual ones.
    """
    parts = dict(state)
    try:
        codes = parts.pop("").contiguous().view(torch.uint8).view(-1, 1)  # may be stored as another dtype
        read = bnb.QuantState.from_dict(parts, device=codes.device)
        table = bnb.get_4bit_type(read.quant_type, device=codes.device)
        expected = empty_packed(read.shape, read.nested, device="meta")
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"cannot read a bitsandbytes 4-bit weight: {error or 'unknown key'}") from error
    nested = (read.state2.code, read.state2.absmax, read.offset) if read.nested else ()
    packed = Packed(codes, read.absmax, *nested)
    block_sizes = (read.blocksize, read.state2.blocksize if read.nested else ABSMAX_BLOCK_SIZE)
    if block_sizes != (BLOCK_SIZE, ABSMAX_BLOCK_SIZE) or not torch.equal(read.code, table):
        raise ModelError(
            f"a bitsandbytes 4-bit weight has block sizes {block_sizes} or a table of its own; only "
            f"{(BLOCK_SIZE, ABSMAX_BLOCK_SIZE)} with the standard table can be read"
        )
    for part, wanted in zip(packed, expected, strict=True):
        if wanted is not None and (part is None or (part.dtype, part.shape) != (wanted.dtype, wanted.shape)):
            raise ModelError(f"a bitsandbytes 4-bit weight of shape {tuple(read.shape)} has a damaged part")
    return packed, tuple(read.shape), read.dtype, read.quant_type


def _borders_and_order(quant_type: str) -> tuple[Tensor, Tensor]:
    """Return the 15 borders between neighbouring table entries, rising, and the entries' numbers likewise."""
    table = bnb.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(table)
    return (table[order[:-1]] + table[order[1:]]) / 2, order


def _quantize_by_kernel(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return the codes and absmax of a flat weight by bitsandbytes' operator, a long one in parts."""
    parts = [
        torch.ops.bitsandbytes.quantize_4bit(part, BLOCK_SIZE, quant_type, torch.uint8)
        for part in flat.split(MAX_KERNEL_WEIGHTS)
    ]
    if len(parts) == 1:
        return parts[0]
    codes, absmax = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(absmax)


def _quantize_on_cpu(flat: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return the codes and absmax of a flat weight without NaN; each thread packs whole chunks."""
    codes, absmax, *_ = empty_packed(flat.shape, double_quant=False, device="cpu")
    borders, order = _borders_and_order(quant_type)
    pairs = (order.view(-1, 1) << 4 | order).to(torch.uint8).view(-1).numpy()  # [256]: two ranks to a byte
    complete = len(flat) - len(flat) % BLOCK_SIZE

    def pack_chunk(start: int) -> None:
        stop = min(start + _CHUNK_WEIGHTS, complete)
        scaled = flat[start:stop].view(-1, BLOCK_SIZE).to(torch.float32, copy=True)
        chunk_absmax = absmax[start // BLOCK_SIZE : stop // BLOCK_SIZE]
        torch.amax(scaled.abs(), dim=1, out=chunk_absmax)
        scaled.mul_((1 / chunk_absmax.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(1))
        above = np.greater(scaled.view(-1).numpy(), borders.unsqueeze(1).numpy())  # [15, weights]
        ranks = np.add.reduce(above.view(np.uint8), axis=0, dtype=np.uint8)
        two = ranks.view("<u2")  # the first of two is the low byte, on any machine
        packed = (two << 4 | two >> 8).astype(np.uint8)
        codes[start // 2 : stop // 2, 0] = torch.from_numpy(packed if quant_type == "nf4" else pairs[packed])

    threads, starts = torch.get_num_threads(), range(0, complete, _CHUNK_WEIGHTS)
    workers = min(threads, _MAX_THREADS)
    try:  # torch's own threads inside each worker would be more than there are cores
        if workers == 1 or len(starts) <= _FEW_CHUNKS:
            list(map(pack_chunk, starts))
        else:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(pack_chunk, starts))
    finally:
        torch.set_num_threads(threads)  # it is a thread's own, but new threads start with the last one set
    if complete < len(flat):
        rest = quantize_reference(flat[complete:], quant_type, double_quant=False)
        codes[complete // 2 :], absmax[-1:] = rest.codes, rest.absmax
    return codes, absmax
