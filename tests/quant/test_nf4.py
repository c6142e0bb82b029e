"""Packing and dequantisation against bitsandbytes and the plain-torch reference, always to the last bit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import prod

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.errors import ModelError
from qlora_lite.quant import nf4

QUANT_STATE = "quant_state.bitsandbytes__nf4"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# last dimensions that are and are not multiples of 64, 16 and 2; whole blocks and incomplete ones; one weight
SHAPES = ((8, 64), (10, 80), (7, 16), (128, 48), (2, 96), (3, 33), (5, 34), (64, 65), (1, 1), (300, 192))

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
single_and_double = pytest.mark.parametrize("double_quant", [False, True], ids=("single", "double"))


@pytest.fixture(autouse=True)
def _two_threads():
    """Pack with two threads, which a test process of several may not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def packed_by_bitsandbytes(weight, quant_type, double_quant):
    codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
    if not double_quant:
        return nf4.Packed(codes, state.absmax), state
    return nf4.Packed(codes, state.absmax, state.state2.code, state.state2.absmax, state.offset), state


def assert_same_bytes(actual, expected):
    for name, ours, theirs in zip(nf4.Packed._fields, actual, expected, strict=True):
        if theirs is None:
            assert ours is None, name
        else:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
            assert torch.equal(ours, theirs), name


def assert_packs_as_bitsandbytes_does(weight, quant_type="nf4", double_quant=True):
    assert_same_bytes(
        nf4.quantize(weight, quant_type, double_quant),
        packed_by_bitsandbytes(weight, quant_type, double_quant)[0],
    )


# Packing


@each_dtype
@each_type
@each_shape
@single_and_double
def test_packed_bytes_equal_those_of_bitsandbytes_and_the_reference(dtype, quant_type, shape, double_quant):
    weight = normal(shape, dtype)
    packed = nf4.quantize(weight, quant_type, double_quant)
    assert_same_bytes(packed, packed_by_bitsandbytes(weight, quant_type, double_quant)[0])
    assert_same_bytes(packed, nf4.quantize_reference(weight, quant_type, double_quant))


@each_dtype
@each_type
def test_weights_over_several_chunks_of_any_distribution_pack_the_same(dtype, quant_type):
    random = torch.Generator().manual_seed(1)
    weights = 3 * nf4._CHUNK_WEIGHTS + 77
    uniform = torch.rand(weights, generator=random) * 2 - 1
    for values in (uniform, uniform**9, uniform.sign(), torch.randn(weights, generator=random).exp()):
        assert_packs_as_bitsandbytes_does(values.to(dtype), quant_type)


@each_type
def test_every_bfloat16_pair_of_weight_and_absmax_packs_the_same(quant_type):
    """A common power of two changes nothing: all there is are two mantissas and a distance of exponents."""
    values = torch.cat([torch.arange(-255, 256) / 128 * 2.0**-exponent for exponent in range(12)]).unique()
    for mantissa in range(128, 256):
        largest = mantissa / 128
        below = values[values.abs() <= largest]
        below = torch.cat((below, torch.zeros(-len(below) % 63))).view(-1, 63)
        weight = torch.cat((torch.full((len(below), 1), largest), below), dim=1).bfloat16()
        assert_packs_as_bitsandbytes_does(weight, quant_type, double_quant=False)


@each_dtype
@each_type
def test_weights_right_at_the_borders_pack_the_same(dtype, quant_type):
    borders, _ = nf4._borders_and_order(quant_type)
    largest = normal(2000, torch.float32, seed=2).abs().to(dtype) + torch.finfo(dtype).tiny
    at_border = (largest.double().unsqueeze(1) * borders.double()).to(dtype)
    one_up = at_border.nextafter(torch.ones((), dtype=dtype))
    one_down = at_border.nextafter(-torch.ones((), dtype=dtype))
    weight = torch.cat((largest.unsqueeze(1), at_border, one_up, one_down), dim=1)
    whole_blocks = torch.nn.functional.pad(weight, (0, 64 - weight.shape[1]))
    assert_packs_as_bitsandbytes_does(whole_blocks, quant_type)
    for incomplete_block in weight[:200]:
        assert_packs_as_bitsandbytes_does(incomplete_block, quant_type, double_quant=False)


@each_dtype
@each_type
@pytest.mark.parametrize("weights", [64, 640, 63, 65, 127, 1])
def test_zeros_negative_zeros_denormals_and_huge_values_pack_the_same(dtype, quant_type, weights):
    limits = torch.finfo(dtype)
    for value in (0.0, -0.0, limits.smallest_normal, limits.smallest_normal / 4, limits.max, -limits.max):
        constant = torch.full((weights,), value, dtype=dtype)
        assert_packs_as_bitsandbytes_does(constant, quant_type)
        mixed = torch.cat((constant, normal(weights, dtype), -constant))
        assert_packs_as_bitsandbytes_does(mixed, quant_type)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    st.sampled_from(DTYPES),
    st.sampled_from(("nf4", "fp4")),
    st.booleans(),
)
def test_any_finite_weights_pack_the_same(values, dtype, quant_type, double_quant):
    weight = torch.tensor(values).to(dtype)
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert_packs_as_bitsandbytes_does(weight, quant_type, double_quant)


@each_dtype
def test_packing_changes_neither_the_weight_nor_the_number_of_threads(dtype):
    weight = normal((300, 64), dtype)
    before, threads = weight.clone(), torch.get_num_threads()
    nf4.quantize(weight)
    assert torch.equal(weight, before)
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads


def test_a_transposed_weight_that_requires_a_gradient_packs_as_its_contiguous_copy():
    weight = normal((96, 64)).requires_grad_()
    assert_same_bytes(nf4.quantize(weight.t()), nf4.quantize(weight.detach().t().contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@each_dtype
def test_a_weight_that_is_not_finite_is_refused(dtype, value):
    weight = normal((8, 64), dtype)
    weight[3, 3] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        nf4.quantize(weight)


def test_an_empty_weight_and_another_dtype_are_refused():
    for weight in (torch.empty(0, 64), torch.zeros(64, dtype=torch.int8), torch.zeros(64).double()):
        with pytest.raises(ModelError, match="cannot quantise a weight of"):
            nf4.quantize(weight)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux' /proc")
def test_packing_a_large_weight_needs_at_most_64_mib_beside_the_result():
    script = """if True:
        import torch
        from qlora_lite.quant import nf4
        def peak_bytes():
            text = open("/proc/self/status").read()
            return int(text.split("VmHWM:")[1].split()[0]) * 1024
        nf4.quantize(torch.ones(64))  # load what the first call loads
        weight = torch.empty(4096, 11008, dtype=torch.bfloat16).uniform_(-1, 1)
        before = peak_bytes()
        packed = nf4.quantize(weight, double_quant=False)
        print(peak_bytes() - before - packed.codes.nbytes - packed.absmax.nbytes)
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ})
    assert int(run.stdout) < 64 * 2**20


# Dequantisation


def plainly_unpacked(packed, shape, dtype, quant_type):
    """Do what `dequantize` does, in short plain torch."""
    absmax = packed.absmax
    if packed.absmax_code is not None:
        scale = packed.absmax_scale.repeat_interleave(nf4.ABSMAX_BLOCK_SIZE)[: len(absmax)]
        absmax = packed.absmax_code[absmax.long()] * scale + packed.absmax_offset
    numbers = torch.stack((packed.codes >> 4, packed.codes & 15), dim=1).view(-1)[: prod(shape)]
    table = bnb.get_4bit_type(quant_type, device=packed.codes.device)
    values = table[numbers.long()] * absmax.repeat_interleave(nf4.BLOCK_SIZE)[: len(numbers)]
    return values.to(dtype).view(tuple(shape))


@each_dtype
@each_type
@each_shape
@single_and_double
def test_unpacked_weights_equal_the_reference(dtype, quant_type, shape, double_quant):
    packed = nf4.quantize(normal(shape), quant_type, double_quant)
    weight = nf4.dequantize(packed, shape, dtype, quant_type)
    assert weight.shape == shape and weight.dtype == dtype and weight.is_contiguous()
    assert torch.equal(weight, plainly_unpacked(packed, shape, dtype, quant_type))


@each_dtype
@each_type
@single_and_double
def test_unpacked_weights_equal_those_of_bitsandbytes(dtype, quant_type, double_quant):
    weight = normal((300, 192), dtype)
    packed, state = packed_by_bitsandbytes(weight, quant_type, double_quant)
    theirs = bnb.dequantize_4bit(packed.codes, state)
    assert torch.equal(nf4.dequantize(packed, weight.shape, dtype, quant_type), theirs)


@each_type
def test_an_unpacked_weight_lies_within_half_a_step_of_the_original(quant_type):
    weight = normal((300, 192))
    packed = nf4.quantize(weight, quant_type, double_quant=False)
    _, order = nf4._borders_and_order(quant_type)
    table = bnb.get_4bit_type(quant_type, device="cpu")[order]
    half_step = (table[1:] - table[:-1]).max() / 2
    error = (nf4.dequantize(packed, weight.shape, torch.float32, quant_type) - weight).abs().view(-1, 64)
    assert (error <= packed.absmax.unsqueeze(1) * half_step * 1.000001).all()


@single_and_double
@each_shape
def test_unpacking_runs_on_fake_tensors(shape, double_quant):
    with FakeTensorMode():
        packed = nf4.empty_packed(shape, double_quant, device="cuda" if torch.cuda.is_available() else "cpu")
        weight = nf4.dequantize(packed, shape, torch.bfloat16)
    assert weight.shape == shape and weight.dtype == torch.bfloat16
    assert weight.device == packed.codes.device


@single_and_double
@each_shape
def test_an_empty_packed_weight_has_the_parts_of_a_real_one(shape, double_quant):
    real = nf4.quantize(normal(shape), "nf4", double_quant)
    empty = nf4.empty_packed(shape, double_quant, device="meta")
    for ours, theirs in zip(empty, real, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


# Files


@each_dtype
@each_type
@single_and_double
def test_a_state_has_the_same_keys_and_bytes_as_the_one_bitsandbytes_writes(dtype, quant_type, double_quant):
    weight = normal((300, 192), dtype)
    packed, state = packed_by_bitsandbytes(weight, quant_type, double_quant)
    ours = nf4.to_bnb_state(packed, weight.shape, dtype, quant_type)
    theirs = {"": packed.codes, **state.as_dict(packed=True)}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@each_dtype
@each_type
@single_and_double
def test_bitsandbytes_reads_our_state_from_a_file_and_we_read_it_back(dtype, quant_type, double_quant):
    weight = normal((300, 192), dtype)
    packed = nf4.quantize(weight, quant_type, double_quant)
    state = nf4.to_bnb_state(packed, weight.shape, dtype, quant_type)
    stored = load(save({"weight." + key: part for key, part in state.items()}))
    stored = {key.removeprefix("weight."): part for key, part in stored.items()}

    read, shape, read_dtype, read_type = nf4.from_bnb_state(stored)
    assert_same_bytes(read, packed)
    assert (shape, read_dtype, read_type) == ((300, 192), dtype, quant_type)

    codes = stored.pop("")
    theirs = bnb.dequantize_4bit(codes, bnb.QuantState.from_dict(stored, device="cpu"))
    assert torch.equal(theirs, nf4.dequantize(packed, weight.shape, dtype, quant_type))


def test_codes_stored_as_another_dtype_are_read():
    weight = normal((8, 64))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    read, *_ = nf4.from_bnb_state({"": codes, **state.as_dict(packed=True)})
    assert_same_bytes(read, nf4.quantize(weight, "nf4", double_quant=False))


@pytest.mark.parametrize("key", ["", "absmax", "quant_map", "nested_quant_map", QUANT_STATE])
def test_a_state_without_one_of_its_parts_is_an_error(key):
    state = nf4.to_bnb_state(nf4.quantize(normal((8, 64))), (8, 64), torch.bfloat16)
    del state[key]
    with pytest.raises(ModelError, match="cannot read a bitsandbytes 4-bit weight"):
        nf4.from_bnb_state(state)


@pytest.mark.parametrize("key", ["", "absmax", "nested_absmax", "nested_quant_map"])
def test_a_state_with_a_part_cut_short_is_an_error(key):
    state = nf4.to_bnb_state(nf4.quantize(normal((300, 192))), (300, 192), torch.bfloat16)
    state[key] = state[key][:-1]
    with pytest.raises(ModelError, match="damaged part"):
        nf4.from_bnb_state(state)


def test_a_state_with_damaged_json_is_an_error():
    state = nf4.to_bnb_state(nf4.quantize(normal((8, 64))), (8, 64), torch.bfloat16)
    state[QUANT_STATE] = state[QUANT_STATE][:-5]
    with pytest.raises(ModelError, match="cannot read"):
        nf4.from_bnb_state(state)


def test_a_state_with_another_block_size_or_table_is_an_error():
    codes, other = bnb.quantize_4bit(normal((8, 128)), quant_type="nf4", blocksize=128)
    with pytest.raises(ModelError, match="block sizes"):
        nf4.from_bnb_state({"": codes, **other.as_dict(packed=True)})
    state = nf4.to_bnb_state(nf4.quantize(normal((8, 64))), (8, 64), torch.bfloat16)
    state["quant_map"] = state["quant_map"] * 0.5
    with pytest.raises(ModelError, match="table of its own"):
        nf4.from_bnb_state(state)


# On a GPU


@pytest.mark.gpu
@each_dtype
@each_type
@each_shape
def test_a_gpu_packs_as_bitsandbytes_does_there_and_unpacks_as_the_reference(dtype, quant_type, shape):
    weight = normal(shape, dtype).cuda()
    assert_packs_as_bitsandbytes_does(weight, quant_type)
    packed = nf4.quantize(weight, quant_type)
    assert torch.equal(
        nf4.dequantize(packed, shape, dtype, quant_type),
        plainly_unpacked(packed, shape, dtype, quant_type),
    )


@single_and_double
@each_type
@pytest.mark.parametrize("rows", [slice(0, 300), slice(7, 130), slice(299, 300), [5, 5, 299, 0], []], ids=str)
def test_rows_unpacked_alone_equal_those_of_the_whole_weight(rows, quant_type, double_quant):
    weight = normal((300, 192), torch.bfloat16)
    packed = nf4.quantize(weight, quant_type, double_quant)
    numbers = torch.tensor(rows, dtype=torch.int64) if isinstance(rows, list) else rows
    for dtype in (torch.bfloat16, torch.float32):
        whole = nf4.dequantize(packed, weight.shape, dtype, quant_type)
        some = nf4.dequantize_rows(packed, weight.shape, numbers, dtype, quant_type)
        assert torch.equal(some, whole[numbers])


class WeightsOfCalls(TorchDispatchMode):
    """Note how many weights each call of bitsandbytes' 4-bit operators takes, of those in this thread alone."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.bitsandbytes.quantize_4bit.default:
            self.counts.append(args[0].numel())
        if function is torch.ops.bitsandbytes.dequantize_4bit.default:
            self.counts.append(result.numel())
        return result


@each_type
def test_a_weight_longer_than_a_kernel_may_take_is_packed_and_unpacked_in_parts_to_the_same_bits(
    quant_type, monkeypatch
):
    weight = torch.randn(7, 101, generator=torch.Generator().manual_seed(3))  # three parts and an incomplete block
    packed = nf4.quantize(weight, quant_type)
    expected = nf4.dequantize(packed, weight.shape, torch.float32, quant_type)
    whole = nf4._quantize_by_kernel(weight.view(-1), quant_type)
    monkeypatch.setattr(nf4, "MAX_KERNEL_WEIGHTS", 256)
    with WeightsOfCalls() as seen:
        parts = nf4._quantize_by_kernel(weight.view(-1), quant_type)
        assert torch.equal(nf4.dequantize(packed, weight.shape, torch.float32, quant_type), expected)
    assert all(map(torch.equal, parts, whole))
    assert seen.counts == [256, 256, 195, 256, 256, 196]  # an odd number is unpacked with its other half byte
