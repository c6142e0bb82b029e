"""A format is its entry in the registry: what holds, dequantises, moves and counts a weight asks that and no name."""

import pytest
import torch
from counted import counted
from memory_option_cases import CPU, PLAIN, gradients
from tiny import build_tiny, random_factors

from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.memory.marks import phase
from qlora_lite.memory.work import Work
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, place
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.product import materialize
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.inventory import inventory


class Halves:
    """A format of this test alone: half of each weight, and as a second part two to multiply it by."""

    about = "halves of weights"
    block = 1

    def parts(self, shape, double_quant=False):
        return {"weight": (torch.float64, tuple(shape)), "factor": (torch.int16, (1,))}

    def dequantize(self, tensors, shape, dtype):
        return (tensors[0] * tensors[1]).view(shape).to(dtype)

    def dequantize_rows(self, tensors, shape, rows, dtype):
        return (tensors[0].view(shape)[rows] * tensors[1]).to(dtype)


def packed(model):
    """The model with its linear layers in that format."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "layers" in path:
            parts = layer.weight.detach().double() / 2, torch.tensor([2], dtype=torch.int16)
            model.set_submodule(path, QuantLinear.from_packed(parts, layer.weight.shape, None, "halves", torch.float32))
    return model


def adapted(model, options=PLAIN):
    torch.manual_seed(0)
    add_lora(model, rank=4, dtype=torch.float32)
    random_factors(model)
    return place(model, CPU, options)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(FORMATS, "halves", Halves())


@pytest.mark.parametrize("options", [PLAIN, MemoryOptions(resident_layers=0), MemoryOptions(cache_dequantized=True)])
def test_a_format_of_a_test_is_trained_on_wherever_its_parts_lie(options):
    plain, model = (
        adapted(adopt(make(build_tiny("llama"))), where)
        for make, where in ((lambda model: model, PLAIN), (packed, options))
    )
    found, expected = gradients(model, options), gradients(plain, PLAIN)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_its_parts_are_counted_by_their_bytes_and_keep_their_types():
    model = adapted(adopt(packed(build_tiny("llama"))))
    numbers = sum(m.out_features * m.in_features for m in model.modules() if isinstance(m, QuantLinear))
    entries = [entry for entry in inventory(causal_lm(), model) if entry.why.startswith("halves of weights")]
    assert [(entry.bytes, entry.dtype) for entry in entries] == [(8 * numbers, "float64")]
    constants = [entry for entry in inventory(causal_lm(), model) if entry.group == "quantisation constants"]
    assert [(entry.dtype, entry.why) for entry in constants] == [("int16", "of the codes, as published")]
    layer = next(module for module in model.half().modules() if isinstance(module, QuantLinear))
    assert [tensor.dtype for tensor in layer.described[1]] == [torch.float64, torch.int16]
    assert materialize(*frozen_weight(layer), torch.float32).shape == layer.shape


@pytest.mark.parametrize(
    ("name", "at_once"),
    [
        ("q6_k", "formats.gguf_blocks.AT_ONCE"),
        ("fp8_128x128", "pieces.ROWS_AT_ONCE"),
        ("gptq_4_128", "pieces.ROWS_AT_ONCE"),
        ("mxfp4", "formats.mxfp4.AT_ONCE"),
    ],
)
@pytest.mark.parametrize("shape", [(256, 512), (3, 256, 512)], ids=["a weight", "experts"])
def test_a_plan_counts_the_work_of_all_pieces_though_it_runs_few(name, at_once, shape, monkeypatch):
    # blocks, or weights: pieces and a rest
    monkeypatch.setattr(f"qlora_lite.quant.{at_once}", 700 if name == "mxfp4" else 700 * 32)

    def work(device):
        tensors = [torch.zeros(size, dtype=dtype, device=device) for dtype, size in FORMATS[name].parts(shape).values()]
        with phase("forward"), counted() as counter:
            FORMATS[name].dequantize(tensors, shape, torch.bfloat16)
        return counter.work

    assert work("meta") == work("cpu") != Work()


@pytest.mark.parametrize("shape", [(256, 512), (8, 256, 512)], ids=["a weight", "experts"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_parts_of_every_format_begin_with_its_codes(name, shape):
    parts = FORMATS[name].parts(shape)
    assert next(iter(parts)) == "weight" and FORMATS[name].about
    with torch.device("meta"):
        tensors = [torch.empty(size, dtype=dtype) for dtype, size in parts.values()]
        weight = FORMATS[name].dequantize(tensors, shape, torch.bfloat16)
        rows = FORMATS[name].dequantize_rows(tensors, shape, slice(3, 7), torch.bfloat16)
    assert (weight.shape, rows.shape) == (shape, (4, *shape[1:])) and weight.dtype == rows.dtype == torch.bfloat16
