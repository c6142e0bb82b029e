"""GGUF's block formats, taken apart by torch, give every byte that the ``gguf`` package gives."""

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import dequantize as by_gguf
from tiny_gguf import random_codes

from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.formats import gguf_blocks as blocks
from qlora_lite.quant.formats.gguf_blocks import GGUF_BLOCKS
from qlora_lite.quant.linear import QuantLinear, squared_row_norms

SHAPE = (37, 512)


def reference(name: str, codes: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(by_gguf(codes.numpy(), GGMLQuantizationType[name.upper()]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])  # in which 0 is not -0


def layer(name: str, codes: torch.Tensor, shape=SHAPE, bias=None) -> QuantLinear:
    return QuantLinear.from_packed((codes,), shape, bias, name, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GGUF_BLOCKS)
def test_every_byte_is_that_of_the_gguf_package(name, dtype, monkeypatch):
    kind = GGMLQuantizationType[name.upper()]
    assert (FORMATS[name].block, FORMATS[name].block_bytes) == GGML_QUANT_SIZES[kind]
    codes = random_codes(name, SHAPE)
    expected = reference(name, codes).to(dtype)
    for at_once in (blocks.AT_ONCE, 3 * 256):  # whole, and cut where no row ends
        monkeypatch.setattr(blocks, "AT_ONCE", at_once)
        found = FORMATS[name].dequantize([codes], SHAPE, dtype)
        assert found.dtype == dtype and torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("name", GGUF_BLOCKS)
def test_rows_are_dequantised_without_the_others(name):
    codes, numbers = random_codes(name, SHAPE), torch.tensor([5, 0, 36, 5])
    whole = FORMATS[name].dequantize([codes], SHAPE, torch.float32)
    for rows in (slice(3, 9), numbers):
        assert torch.equal(FORMATS[name].dequantize_rows([codes], SHAPE, rows, torch.float32), whole[rows])
    assert torch.allclose(squared_row_norms(layer(name, codes)), whole.square().sum(1))


@pytest.mark.parametrize("name", GGUF_BLOCKS)
def test_a_layer_on_its_codes_is_the_dequantised_one_gradients_included(name):
    codes, bias = random_codes(name, SHAPE), torch.randn(SHAPE[0])
    packed, weight = layer(name, codes, bias=bias), reference(name, codes)
    x, other = (torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "xy")

    y, expected = packed(x), torch.nn.functional.linear(other, weight, bias)
    y.square().sum().backward()
    expected.square().sum().backward()

    assert torch.equal(y, expected) and torch.equal(x.grad, other.grad)
    assert sum(buffer.nbytes for buffer in packed.buffers()) == codes.nbytes


def test_codes_keep_their_type_when_a_model_changes_its():
    packed = layer("q6_k", random_codes("q6_k", SHAPE))
    assert packed.to(torch.float16).weight.dtype == torch.uint8
    assert torch.equal(packed.half().weight, random_codes("q6_k", SHAPE))


@pytest.mark.parametrize("name", GGUF_BLOCKS)
def test_a_single_block_anywhere_in_memory_is_dequantised(name):
    shape = (1, FORMATS[name].block)
    codes = random_codes(name, (4, shape[1]))[3:].clone()
    moved = torch.cat([torch.zeros(2, dtype=torch.uint8), codes.view(-1)])[2:].view(codes.shape)
    assert torch.equal(FORMATS[name].dequantize([moved], shape, torch.float32), reference(name, codes))
