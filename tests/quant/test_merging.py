"""The weight that a merge will leave: what it is on average, and what llama.cpp's quantiser makes of it."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from qlora_lite.quant import closest
from qlora_lite.quant.bnb import functional as bnb
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.merging import AT_ONCE, Merging, closest_codes, merged_blocks, merged_codes
from qlora_lite.quant.nf4 import absmax_of, dequantize, quantize
from qlora_lite.quant.product import WeightSpec, materialize

SHAPES = [(64, 96), (7, 98), (3, 64), (AT_ONCE // 128 + 70, 128)]  # the last one in two pieces


def of_shape(shape, size=0.05, seed=0):
    """A weight, and LoRA weights whose product moves a part of it by a code."""
    chance = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(shape, generator=chance)
    return weight, 0.1 * torch.randn(4, shape[1], generator=chance), size * torch.randn(shape[0], 4, generator=chance)


def read_blocks(kind, blocks, shape, dtype):
    return FORMATS[kind].dequantize((blocks,), shape, dtype)


def codes_of(packed, shape):
    return torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1)[: shape[0] * shape[1]].view(shape).long()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_each_weight_moves_by_its_update_over_the_step_beside_it_rounded_up_or_down(shape, double_quant):
    weight, a, b = of_shape(shape)
    packed = quantize(weight, double_quant=double_quant)
    merged = merged_codes(Merging("nf4", 2.0, "a"), packed, a, b)
    table, old, new = bnb.get_4bit_type("nf4", device="cpu").double(), codes_of(packed, shape), codes_of(merged, shape)
    absmax = absmax_of(packed).double().repeat_interleave(64)[: weight.numel()].view(shape)
    update = 2.0 * b.double() @ a.double() / absmax
    beside = (old + update.sign().long()).clamp(0, 15)
    step = (table[beside] - table[old]).abs()
    moves = torch.where(step > 0, update / step, 0.0)
    at_ends = (old + moves.floor() < 0) | (old + moves.ceil() > 15)
    assert ((new - old - moves).abs() < 1 + 1e-5)[~at_ends].all()
    assert ((new - old) * update >= 0).all() and (new != old).any() and (new == old).any()
    for name in ("absmax", "absmax_code", "absmax_scale", "absmax_offset"):
        assert getattr(merged, name) is getattr(packed, name)


@pytest.mark.parametrize("to_inputs", [False, True])
def test_blocks_whose_absmax_8_bits_make_negative_move_by_their_update_too(to_inputs):
    """As double quantisation leaves blocks far below the mean: the weight is the absmax times the code all the same."""
    shape, chance = (64, 128), torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(shape, generator=chance)
    packed = quantize(weight, double_quant=False)
    absmax = packed.absmax.clone()
    absmax[::2] *= -1
    absmax[:4] = 0
    packed = packed._replace(absmax=absmax)
    a, b = 0.1 * torch.randn(4, 128, generator=chance), 0.05 * torch.randn(64, 4, generator=chance)
    before = dequantize(packed, shape, torch.float32)
    own = Merging("nf4", 1.0, "a"), packed, a, b
    found = closest_codes(*own, 0.01 * torch.eye(128)) if to_inputs else merged_codes(*own)
    moved, update = dequantize(found, shape, torch.float32) - before, b @ a
    for sign in (-1, 1):
        some = (absmax.sign() == sign).repeat_interleave(64).view(shape)
        assert (moved[some] @ update[some] / update[some].square().sum()).item() == pytest.approx(1, abs=0.2)
    assert (moved.view(-1, 64)[:4] == 0).all()


def test_the_mean_over_many_names_is_the_update_and_a_name_always_gives_the_same():
    shape = (64, 128)
    weight, a, b = of_shape(shape, size=0.02)
    packed = quantize(weight)
    before = dequantize(packed, shape, torch.float32)
    moved = [
        dequantize(merged_codes(Merging("nf4", 1.0, str(name)), packed, a, b), shape, torch.float32) - before
        for name in range(300)
    ]
    inside = (codes_of(packed, shape) % 15) > 0  # the largest of a block cannot grow
    update, mean = (b @ a)[inside], torch.stack(moved).mean(0)[inside]
    assert ((mean * update).sum() / update.square().sum()).item() == pytest.approx(1, abs=0.02)
    noise = (torch.stack(moved)[:, inside] - update).square().mean().sqrt()
    assert (mean - update).square().mean().sqrt() < 1.2 * noise / 300**0.5, "errors of different names are independent"
    assert torch.equal(
        moved[3], dequantize(merged_codes(Merging("nf4", 1.0, "3"), packed, a, b), shape, torch.float32) - before
    ) and not torch.equal(moved[3], moved[4])


def test_the_errors_of_one_weight_are_spread_over_all_directions_as_independent_ones_are():
    shape = (256, 256)
    weight, a, b = of_shape(shape, size=0.01)
    packed = quantize(weight)
    moved = merged_codes(Merging("nf4", 1.0, "a"), packed, a, b)
    error = dequantize(moved, shape, torch.float32) - dequantize(packed, shape, torch.float32) - b @ a
    independent = error.view(-1)[torch.randperm(error.numel(), generator=torch.Generator().manual_seed(0))].view(shape)
    largest = [torch.linalg.matrix_norm(each, 2) for each in (error, independent)]
    assert largest[0] < 1.15 * largest[1]


def test_without_an_update_nothing_moves():
    weight, a, b = of_shape((7, 98))
    packed = quantize(weight)
    assert torch.equal(merged_codes(Merging("nf4", 2.0, "a"), packed, a, 0 * b).codes, packed.codes)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize("shape", [(64, 96), (3, 32), (AT_ONCE // 128 + 70, 128)])
def test_blocks_are_what_a_reader_gets_of_llama_cpp_s_quantiser_and_stay_so_when_written_again(kind, shape):
    weight, a, b = of_shape(shape)
    weight[0], b[0] = 0, 0
    found = read_blocks(kind, merged_blocks(Merging(kind, 2.0, "a"), weight, a, b), shape, torch.float32)
    stored_as = GGMLQuantizationType[kind.upper()]
    for source in (torch.addmm(weight, b, a, alpha=2.0), found):
        read = quants.dequantize(quants.quantize(source.numpy(), stored_as), stored_as)
        assert torch.equal(found, torch.from_numpy(read))


@pytest.mark.parametrize("to", ["nf4", "q4_0"])
def test_a_product_s_weight_is_the_merged_one_of_a_4_bit_or_a_transposed_16_bit_weight(to):
    shape = (64, 96)
    weight, a, b = of_shape(shape)
    packed, merging = quantize(weight), Merging(to, 2.0, "a")
    parts = tuple(packed)
    found = materialize(WeightSpec(shape, "nf4", merging=merging), (*parts, a, b), torch.bfloat16)
    if to == "nf4":
        assert torch.equal(found, dequantize(merged_codes(merging, packed, a, b), shape, torch.bfloat16))
        return
    read = dequantize(packed, shape, torch.float32)
    blocks = merged_blocks(merging, read, a, b)
    assert torch.equal(found, read_blocks(to, blocks, shape, torch.bfloat16))
    spec = WeightSpec(shape, None, transposed=True, merging=merging)
    stored = read.t().contiguous()
    assert torch.equal(materialize(spec, (stored, a, b), torch.float32), read_blocks(to, blocks, shape, torch.float32))


@pytest.mark.parametrize("shape", [(16, 96), (40, 160)])
def test_codes_for_given_inputs_are_ones_that_no_change_of_a_single_weight_makes_better(shape, monkeypatch):
    monkeypatch.setattr(closest, "SWEEPS", 12)
    weight, a, b = of_shape(shape, size=0.02)
    packed, merge = quantize(weight), Merging("nf4", 2.0, "a")
    inputs = torch.randn(400, 8, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        8, shape[1], generator=torch.Generator().manual_seed(2)
    ) + 0.3 * torch.randn(400, shape[1], generator=torch.Generator().manual_seed(3))
    gram = inputs.t() @ inputs
    target = dequantize(packed, shape, torch.float32).double() + 2.0 * b.double() @ a.double()
    damping = closest.DAMPING * gram.diagonal().mean().double()

    def error(of):
        off = dequantize(of, shape, torch.float32).double() - target
        return (inputs.double() @ off.t()).square().sum(0) + damping * off.square().sum(1)

    found, before = closest_codes(merge, packed, a, b, gram), merged_codes(merge, packed, a, b)
    assert error(found).sum() < 0.3 * error(before).sum()
    numbers, least = codes_of(found, shape), error(found)
    for column in range(0, shape[1], 7):
        for step in (-1, 1):
            changed = numbers.clone()
            changed[:, column] = (changed[:, column] + step).clamp(0, 15)
            pairs = changed.view(-1, 2).to(torch.uint8)
            other = found._replace(codes=(pairs[:, 0] << 4 | pairs[:, 1]).unsqueeze(1))
            assert (error(other) >= least * (1 - 1e-5)).all()
    assert found.absmax is packed.absmax
