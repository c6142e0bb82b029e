"""The Triton kernels of ``kernels.grouped_product``; imported only where they run.

A program computes a tile of one expert's pairs and of the result's columns. How many tiles an expert has is known on
the device, but not more than P / BLOCK_PAIRS + n in all: so many are started, each finds its expert from the offsets,
and those beyond the last one do nothing. Programs that follow one another share the rows and go through an expert's
weights, which stay in the second-level cache for the expert's next rows.

Of sums over an expert's pairs a program computes a tile, all pairs of it.
"""

import torch
import triton
import triton.language as tl

BLOCK_PAIRS, BLOCK_OUT = 64, 128
BLOCK_SUMS, BLOCK_SUMMED = 64, 32  # at most, of rows and columns of a tile; pairs at a time
BLOCK_IN_BYTES = 128  # with three stages 72 KiB of shared memory, of 99 on the smallest GPUs from 8.0 on; with two 48


@triton.jit
def _kernel(
    out,
    rows,
    weights,
    places,
    offsets,
    bias,
    scale,
    first,
    count,
    pairs_of_row,
    in_features,
    out_features,
    expert_stride,
    out_stride,
    in_stride,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    ADD: tl.constexpr,
):
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
        out_at = out + place[:, None] * out_features + column[None, :]
        is_out = (pair < end)[:, None] & (column < out_features)[None, :]
        if ADD:
            total += tl.load(out_at, mask=is_out, other=0).to(tl.float32)
        if bias is not None:
            own = bias + (first + expert) * out_features + column
            total += tl.load(own, mask=column < out_features, other=0).to(tl.float32)[None, :]
        if scale is not None:
            total *= tl.load(scale + place, mask=pair < end, other=0).to(tl.float32)[:, None]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _sums_kernel(
    out,
    left,
    right,
    places,
    offsets,
    pairs_of_left,
    pairs_of_right,
    height,
    width,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    across = tl.cdiv(width, WIDTH)
    tiles = tl.cdiv(height, HEIGHT) * across
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile // across * HEIGHT + tl.arange(0, HEIGHT)
    column = tile % across * WIDTH + tl.arange(0, WIDTH)
    out_at = out + expert.to(tl.int64) * height * width + row[:, None] * width + column[None, :]
    is_out = (row < height)[:, None] & (column < width)[None, :]
    total = tl.load(out_at, mask=is_out, other=0).to(tl.float32)
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        place = tl.load(places + pair, mask=pair < end, other=0)
        of_left = left + (place // pairs_of_left)[None, :] * height + row[:, None]
        of_right = right + (place // pairs_of_right)[:, None] * width + column[None, :]
        one = tl.load(of_left, mask=(pair < end)[None, :] & (row < height)[:, None], other=0)
        other = tl.load(of_right, mask=(pair < end)[:, None] & (column < width)[None, :], other=0)
        if IN_FLOAT32:  # as above
            one, other = one.to(tl.float32), other.to(tl.float32)
        total = tl.dot(one, other, total, input_precision="ieee")
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_out)


def launch_sums(out, left, right, places, offsets) -> None:
    """Start the kernel of sums; the arguments are those of ``add_grouped_sums``."""
    count, height, width = out.shape
    high, wide = (min(BLOCK_SUMS, max(16, triton.next_power_of_2(size))) for size in (height, width))
    _sums_kernel[(count * triton.cdiv(height, high) * triton.cdiv(width, wide),)](
        out,
        left,
        right,
        places,
        offsets,
        len(places) // len(left),
        len(places) // len(right),
        height,
        width,
        HEIGHT=high,
        WIDTH=wide,
        PAIRS=BLOCK_SUMMED,
        IN_FLOAT32=not out.is_cuda,
        num_warps=4,
    )


def launch(out, rows, weights, places, offsets, first, bias=None, scale=None, add=False) -> None:
    """Start the kernel; the arguments are those of ``grouped_product``."""
    count, out_features, in_features = weights.shape
    tiles = triton.cdiv(len(places), BLOCK_PAIRS) + count
    capability = torch.cuda.get_device_capability(rows.device) if rows.is_cuda else (0, 0)
    _kernel[(tiles * triton.cdiv(out_features, BLOCK_OUT),)](
        out,
        rows,
        weights,
        places,
        offsets,
        bias,
        scale,
        first,
        count,
        len(places) // len(rows),
        in_features,
        out_features,
        *weights.stride(),
        EXPERTS=triton.next_power_of_2(count),
        PAIRS=BLOCK_PAIRS,
        OUT=BLOCK_OUT,
        IN=BLOCK_IN_BYTES // rows.element_size(),
        IN_FLOAT32=not rows.is_cuda,
        ADD=add,
        **launch_options(capability, rows.dtype),
    )


def launch_options(capability: tuple[int, int], dtype: torch.dtype) -> dict[str, int]:
    """Return warps, stages and registers of the kernel for a GPU; (0, 0) is none.

    A multiprocessor holds two programs. Where the sums are in registers and the warps multiply one by one (8.x, 12.x),
    four warps need all 255 of a thread; eight do with 128, and hide twice as much latency. What is spilled for that,
    at most 6 registers on 12.0, is out of the loop. On 9.0 and 10.0 warps multiply in groups of four.
    """
    options = {"num_warps": 4, "num_stages": 3 if capability >= (8, 0) else 2}
    if capability[0] in (8, 12) and dtype.itemsize == 2 and torch.version.hip is None:
        options |= {"num_warps": 8, "maxnreg": 128}
    return options
