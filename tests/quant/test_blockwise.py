"""Packing to 8 bits gives bitsandbytes' bytes, whatever the values."""

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lite.quant.blockwise import BLOCK_VALUES, nearest_entries, pack_blocks

SIGNED, UNSIGNED = (bnb.create_dynamic_map(signed=signed) for signed in (True, False))


def check(values, code):
    numbers, absmax = pack_blocks(values, nearest_entries(code))
    expected, expected_absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code.clone(), BLOCK_VALUES)
    assert numbers.shape == values.shape and torch.equal(numbers, expected)
    assert torch.equal(absmax, expected_absmax)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 1000), (16, 4096)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-42])
def test_numbers_and_maxima_equal_those_of_bitsandbytes(code, shape, scale):
    values = normal(*shape) * scale
    check(values if code is SIGNED else values.abs(), code)


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_every_point_of_the_grid_and_every_tie_goes_where_bitsandbytes_puts_it(code):
    points = torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1
    borders = (code[:-1] + code[1:]) / 2
    hard = torch.cat(
        [
            points,
            code,
            borders,
            torch.nextafter(borders, torch.tensor(2.0)),
            torch.nextafter(borders, torch.tensor(-2.0)),
            (points[1:] + points[:-1]) / 2,
        ]
    )
    blocks = torch.nn.functional.pad(hard, (0, -len(hard) % 255)).view(-1, 255)
    check(torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1), code)  # each block's largest is 1


def test_values_of_many_magnitudes_in_one_block_are_packed_alike():
    check(normal(64, 256, seed=1) * 10 ** normal(64, 256, seed=2), SIGNED)


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_a_block_of_zeros_among_others_has_the_number_zero(code):
    values = normal(3, 256).abs()
    values[1] = 0.0
    check(values, code)
    assert not pack_blocks(values, nearest_entries(code))[0][1].any()
