"""The Triton kernel of ``ops.grouped_product``; imported only where it runs.

A program computes a tile of one expert's pairs and of the result's columns. How many tiles an expert has is known on
the device, but not more than P / BLOCK_PAIRS + n in all: so many are started, each finds its expert from the offsets,
and those beyond the last one do nothing. Programs that follow one another share the rows and go through an expert's
weights, which stay in the second-level cache for the expert's next rows.
"""

import torch
import triton
import triton.language as tl

BLOCK_PAIRS, BLOCK_OUT = 64, 128
BLOCK_IN_BYTES = 128  # with three stages 72 KiB of shared memory, of 99 on the smallest GPUs from 8.0 on; with two 48


@triton.jit
def _kernel(
    out, rows, weights, places, offsets, bias, scale, first, count, pairs_of_row, in_features, out_features,
    expert_stride, out_stride, in_stride, EXPERTS: tl.constexpr, PAIRS: tl.constexpr, OUT: tl.constexpr,
    IN: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    out_tiles = tl.cdiv(out_features, OUT)
    tile, out_tile = tl.program_id(0) // out_tiles, tl.program_id(0) % out_tiles
    number = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + first + number, mask=number < count, other=0)
    ends = tl.load(offsets + first + number + 1, mask=number < count, other=0)
    tiles = (ends - starts + PAIRS - 1) // PAIRS
    tiles_until = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_until <= tile).to(tl.int32), 0)
    if expert < count:
        is_it = number == expert
        start = tl.sum(tl.where(is_it, starts + (tile - tiles_until + tiles) * PAIRS, 0), 0)
        end = tl.sum(tl.where(is_it, ends, 0), 0)
        pair = start + tl.arange(0, PAIRS)
        place = tl.load(places + pair, mask=pair < end, other=0)
        column = out_tile * OUT + tl.arange(0, OUT)
        inner = tl.arange(0, IN)
        row_at = rows + (place // pairs_of_row)[:, None] * in_features + inner[None, :]
        weight_at = weights + expert.to(tl.int64) * expert_stride + column[None, :] * out_stride
        weight_at += inner[:, None] * in_stride
        total = tl.zeros((PAIRS, OUT), dtype=tl.float32)
        for done in range(0, in_features, IN):
            is_in = inner < in_features - done
            row = tl.load(row_at + done, mask=(pair < end)[:, None] & is_in[None, :], other=0)
            weight = tl.load(
                weight_at + done * in_stride, mask=is_in[:, None] & (column < out_features)[None, :], other=0
            )
            if IN_FLOAT32:  # Triton's interpreter multiplies no bfloat16
                row, weight = row.to(tl.float32), weight.to(tl.float32)
            total = tl.dot(row, weight, total, input_precision="ieee")
        if bias is not None:
            own = bias + (first + expert) * out_features + column
            total += tl.load(own, mask=column < out_features, other=0).to(tl.float32)[None, :]
        if scale is not None:
            total *= tl.load(scale + place, mask=pair < end, other=0).to(tl.float32)[:, None]
        tl.store(
            out + place[:, None] * out_features + column[None, :], total.to(out.dtype.element_ty),
            mask=(pair < end)[:, None] & (column < out_features)[None, :],
        )  # fmt: skip


def launch(out, rows, weights, places, offsets, first, bias=None, scale=None) -> None:
    """Start the kernel; the arguments are those of ``grouped_product``."""
    count, out_features, in_features = weights.shape
    tiles = triton.cdiv(len(places), BLOCK_PAIRS) + count
    stages = 3 if rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (8, 0) else 2
    _kernel[(tiles * triton.cdiv(out_features, BLOCK_OUT),)](
        out, rows, weights, places, offsets, bias, scale, first, count, len(places) // len(rows), in_features,
        out_features, *weights.stride(), EXPERTS=triton.next_power_of_2(count), PAIRS=BLOCK_PAIRS, OUT=BLOCK_OUT,
        IN=BLOCK_IN_BYTES // rows.element_size(), IN_FLOAT32=not rows.is_cuda, num_warps=4, num_stages=stages,
    )  # fmt: skip
