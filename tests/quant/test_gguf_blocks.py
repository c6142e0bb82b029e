"""GGUF's block formats, taken apart by torch, give every byte that the ``gguf`` package gives."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import dequantize as by_gguf

from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.formats import gguf_blocks as blocks
from qlora_lite.quant.formats.gguf_blocks import GGUF_BLOCKS
from qlora_lite.quant.linear import QuantLinear, squared_row_norms

SCALES = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2)}  # else at 0
SHAPE = (37, 512)


def random_codes(name: str, shape=SHAPE, seed: int = 0) -> torch.Tensor:
    """Return bytes of a weight, each value of a byte among them, with scales of both signs, tiny and zero ones too."""
    kind, generator = FORMATS[name], np.random.default_rng(seed)
    (_, size) = kind.parts(shape)["weight"]
    codes = generator.integers(0, 256, size, dtype=np.uint8).reshape(-1, kind.block_bytes)
    for place in SCALES.get(name, (0,)):
        scale = generator.normal(0, 0.02, len(codes)).astype(np.float16)
        scale[:3] = 0, 1e-7, -0.0
        codes[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(codes.reshape(size))


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
    codes = random_codes(name)
    expected = reference(name, codes).to(dtype)
    for at_once in (blocks.AT_ONCE, 3 * 256):  # whole, and cut where no row ends
        monkeypatch.setattr(blocks, "AT_ONCE", at_once)
        found = FORMATS[name].dequantize([codes], SHAPE, dtype)
        assert found.dtype == dtype and torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("name", GGUF_BLOCKS)
def test_rows_are_dequantised_without_the_others(name):
    codes, numbers = random_codes(name), torch.tensor([5, 0, 36, 5])
    whole = FORMATS[name].dequantize([codes], SHAPE, torch.float32)
    for rows in (slice(3, 9), numbers):
        assert torch.equal(FORMATS[name].dequantize_rows([codes], SHAPE, rows, torch.float32), whole[rows])
    assert torch.allclose(squared_row_norms(layer(name, codes)), whole.square().sum(1))


@pytest.mark.parametrize("name", GGUF_BLOCKS)
def test_a_layer_on_its_codes_is_the_dequantised_one_gradients_included(name):
    codes, bias = random_codes(name), torch.randn(SHAPE[0])
    packed, weight = layer(name, codes, bias=bias), reference(name, codes)
    x, other = (torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "xy")

    y, expected = packed(x), torch.nn.functional.linear(other, weight, bias)
    y.square().sum().backward()
    expected.square().sum().backward()

    assert torch.equal(y, expected) and torch.equal(x.grad, other.grad)
    assert sum(buffer.nbytes for buffer in packed.buffers()) == codes.nbytes


def test_codes_keep_their_type_when_a_model_changes_its():
    packed = layer("q6_k", random_codes("q6_k"))
    assert packed.to(torch.float16).weight.dtype == torch.uint8
    assert torch.equal(packed.half().weight, random_codes("q6_k"))
