"""Products of few rows by the packed weight: as exact as dequantising it first, and only where they are meant to
be."""

import os
import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from tiny import build_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.adapters.lora.inject import add_lora
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.adapters.lora.switch import SwitchLinear
from qlora_lite.adapters.read import Factors
from qlora_lite.adapters.switch import Switch
from qlora_lite.models.quantizer import quantize_in_place
from qlora_lite.quant import linear, small_batch
from qlora_lite.quant.linear import QuantLinear, arrange_weights
from qlora_lite.quant.nf4 import dequantize, quantize
from qlora_lite.quant.small_batch import MAX_ROWS, arrange, arranged_bytes, can_arrange, kernel_takes_our_order

# Most error against float64, in units of that of the dequantised weight's product. Measured over 99 shapes, both types
# and 1 to 33 rows: 1.1 to 1.48, the most where few numbers are averaged (one row, 32 outputs). A GPU's kernel for up to
# three rows, on many GPUs four, rounds every weight and every product to bfloat16 (bitsandbytes 0.50,
# csrc/gemm_4bit_simt.cu; which rows it takes, csrc/gemm_4bit.cu).
FACTOR = {"cpu": 1.6, "cuda": 2.0}
SHAPES = [(32, 64), (64, 128), (96, 192), (192, 576), (1536, 576), (576, 1536), (640, 2048), (32, 4160)]
CPU = torch.device("cpu")
on_this_cpu = pytest.mark.skipif(not bnb.has_avx512bf16(), reason="the CPU kernel needs AVX512-BF16")


class FusedProducts(TorchDispatchMode):
    """Count the products that are made by a packed weight."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = "bitsandbytes::gemv_4bit", "bitsandbytes::gemm_4bit"
        self.count += function._schema.name in names
        return function(*args, **(kwargs or {}))


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(shape, quant_type="nf4", double_quant=True, bias=False, device="cpu"):
    weight = 0.02 * normal(*shape).to(device)
    offset = normal(shape[0], seed=1).to(device) if bias else None
    return QuantLinear.from_weight(weight, offset, quant_type, double_quant).eval()


def arranged(layer):
    layer.arranged = arrange(layer.packed, (layer.out_features, layer.in_features), layer.quant_type)
    return layer


def exact(layer, x):
    """``x W^T + bias`` in float64, of the weight that the codes stand for."""
    weight = dequantize(layer.packed, (layer.out_features, layer.in_features), torch.float32, layer.quant_type)
    y = x.double() @ weight.double().t()
    return y if layer.bias is None else y + layer.bias.double()


def error(found, expected):
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    return (found.double() - expected).norm() / expected.norm()


def assert_as_exact_as_unpacking(fused, plain, x, expected):
    """Compare two callables, the first of which makes one fused product and the second none."""
    with torch.no_grad(), FusedProducts() as seen:
        found = error(fused(x), expected)
    assert seen.count == 1
    with torch.no_grad(), FusedProducts() as seen:
        limit = FACTOR[x.device.type] * error(plain(x), expected)
    assert seen.count == 0
    assert found <= limit


@on_this_cpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_order_is_that_of_bitsandbytes(quant_type, double_quant):
    weight = normal(96, 192)
    codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
    theirs, state = bnb._convert_weight_packed_for_cpu(codes, state)
    ours = arrange(quantize(weight, quant_type, double_quant), (96, 192), quant_type)
    assert torch.equal(ours.codes, theirs) and torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.table, state.code)
    assert ours.codes.nbytes + ours.absmax.nbytes == arranged_bytes((96, 192))


@on_this_cpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_exact_as_those_of_the_unpacked_weight(shape, quant_type):
    layer, plain = arranged(layer_of(shape, quant_type)), layer_of(shape, quant_type)
    for rows in range(1, MAX_ROWS["cpu"] + 1):
        x = normal(1, rows, shape[1], seed=rows)
        assert_as_exact_as_unpacking(layer, plain, x, exact(layer, x))


@on_this_cpu
@pytest.mark.parametrize("alpha", [16, 12])  # a scale that is a power of two, and one that is not
def test_a_bias_and_an_adapter_are_added(alpha):
    shape, x = (192, 576), normal(1, 1, 576, seed=3)
    layers = []
    for make in (arranged, lambda layer: layer):
        layer = LoraLinear(make(layer_of(shape, bias=True)), 8, alpha, 0.0, False, torch.bfloat16).eval()
        with torch.no_grad():
            layer.lora_A.copy_(0.05 * normal(8, 576, seed=4))
            layer.lora_B.copy_(0.05 * normal(192, 8, seed=5))
        layers.append(layer)
    layer = layers[0]
    update = layer.scale * (x.double() @ layer.lora_A.double().t()) @ layer.lora_B.double().t()
    assert_as_exact_as_unpacking(*layers, x, exact(layer.base, x) + update)
    assert_as_exact_as_unpacking(*(layer.base for layer in layers), x, exact(layer.base, x))


@on_this_cpu
@pytest.mark.skipif(MAX_ROWS["cpu"] < 3, reason="the CPU kernel is taken for fewer rows")
def test_every_row_of_a_batch_has_its_own_adapter():
    shape, x, names = (64, 128), normal(3, 1, 128, seed=3), ("one", None, "two")
    factors = {
        name: Factors(0.05 * normal(4, 128, seed=seed), 0.05 * normal(64, 4, seed=seed + 1), 8.0, False)
        for seed, name in enumerate(("one", "two"), 10)
    }
    switches = []
    for make in (arranged, lambda layer: layer):
        switch = Switch(dict.fromkeys(factors))
        switches.append(SwitchLinear(make(layer_of(shape)), switch, factors, CPU, x.dtype, {}).eval())
        switch.use_rows(names)
    expected = exact(switches[0].base, x)
    for place, name in enumerate(names):
        if name:
            a, b = (factor.double().t() for factor in (factors[name].lora_A, factors[name].lora_B))
            expected[place] += factors[name].scale * x[place].double() @ a @ b
    assert_as_exact_as_unpacking(*switches, x, expected)


@on_this_cpu
@pytest.mark.parametrize("why", ["many rows", "gradients", "training", "another type", "no row"])
def test_elsewhere_the_weight_is_unpacked(why):
    layer, plain = arranged(layer_of((64, 128))), layer_of((64, 128))
    rows = {"many rows": MAX_ROWS["cpu"] + 1, "no row": 0}.get(why, 1)
    x = normal(1, rows, 128, dtype=torch.float32 if why == "another type" else torch.bfloat16)
    for each in (layer, plain):
        each.train(why == "training")
    with torch.set_grad_enabled(why == "gradients"), FusedProducts() as seen:
        assert torch.equal(layer(x), plain(x))
    assert seen.count == 0


def test_weights_that_the_kernel_is_not_made_for_are_not_arranged():
    assert not can_arrange((64, 80), CPU)  # rows that are not whole blocks
    assert not can_arrange((48, 128), CPU)  # not 32 rows side by side
    assert not can_arrange((64, 128), torch.device("meta"))
    assert can_arrange((64, 128), CPU) == bool(bnb.has_avx512bf16())


def tiny_model(dtype):
    model = build_tiny("llama", dtype=dtype, intermediate_size=128)
    quantize_in_place(model, "nf4", double_quant=True)
    return model.eval()


@on_this_cpu
def test_a_model_s_layers_are_arranged_and_answer_alike():
    model, plain = tiny_model(torch.bfloat16), tiny_model(torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert arrange_weights(model) == sum(arranged_bytes((x.out_features, x.in_features)) for x in layers)
    assert arrange_weights(model) == 0  # they are already
    ids = torch.tensor([[7]])
    with torch.no_grad(), FusedProducts() as seen:
        found, expected = model(ids).logits.double(), plain(ids).logits.double()
    assert seen.count == len(layers) == 14
    assert (found - expected).norm() <= 0.03 * expected.norm()
    layers[0].set_packed(layers[1].packed)
    assert layers[0].arranged is None  # of the weight that was there before


@on_this_cpu
def test_where_the_kernel_wants_another_order_weights_are_unpacked_and_that_is_said(monkeypatch, caplog):
    def other_order(packed, shape, quant_type):
        ours = arrange(packed, shape, quant_type)
        return ours._replace(codes=ours.codes.roll(1, 0))

    assert kernel_takes_our_order()
    kernel_takes_our_order.cache_clear()
    monkeypatch.setattr(small_batch, "arrange", other_order)
    model = tiny_model(torch.bfloat16)
    assert arrange_weights(model) == 0 and "orders them otherwise on a CPU" in caplog.text
    assert all(module.arranged is None for module in model.modules() if isinstance(module, QuantLinear))
    kernel_takes_our_order.cache_clear()


@on_this_cpu
def test_without_the_memory_for_it_nothing_is_arranged(monkeypatch):
    model = tiny_model(torch.bfloat16)
    monkeypatch.setattr(linear, "free_bytes", lambda device: 4096)
    assert arrange_weights(model) == 0
    assert all(module.arranged is None for module in model.modules() if isinstance(module, QuantLinear))


def test_a_model_that_computes_in_float32_is_not_arranged():
    assert arrange_weights(tiny_model(torch.float32)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu_products_are_as_exact_as_those_of_the_unpacked_weight(shape, quant_type, double_quant):
    layer = layer_of(shape, quant_type, double_quant, bias=True, device="cuda")
    for rows in (1, 3, 4, 5, 7, 8, 33, MAX_ROWS["cuda"]):
        x = normal(1, rows, shape[1], seed=rows).cuda()
        many = x.expand(MAX_ROWS["cuda"] + 1, *x.shape)  # so that the plain path is taken
        assert_as_exact_as_unpacking(layer, lambda x, many=many: layer(many)[0], x, exact(layer, x))


@pytest.mark.parametrize("rows", [1, 5, 32, 512, 513])
def test_a_gpu_s_operator_is_asked_for_every_count_of_rows_that_it_may_have_a_kernel_for(rows, monkeypatch):
    monkeypatch.setitem(MAX_ROWS, "meta", MAX_ROWS["cuda"])
    layer, taken = layer_of((64, 128)).to("meta"), rows <= 512
    adapted = LoraLinear(layer, 8, 12, 0.0, False, torch.bfloat16).eval()
    with torch.no_grad(), FusedProducts() as seen:
        found = [each(torch.empty(1, rows, 128, dtype=torch.bfloat16, device="meta")) for each in (layer, adapted)]
    assert seen.count == 2 * taken and all(y.shape == (1, rows, 64) for y in found)
    with FusedProducts() as seen:
        layer(torch.empty(1, rows, 128, dtype=torch.bfloat16, device="meta"))
    assert seen.count == 0, "where gradients may be wanted"


@pytest.mark.gpu
def test_on_a_gpu_a_model_answers_alike_with_one_token_and_with_many():
    model = add_lora(tiny_model(torch.bfloat16), rank=4).to("cuda").eval()
    ids = torch.tensor([[7]], device="cuda")
    with torch.no_grad(), FusedProducts() as seen:
        found = model(ids).logits
    assert seen.count == 14
    with torch.no_grad():
        expected = model(ids.expand(MAX_ROWS["cuda"] + 1, 1)).logits[:1]
    assert (found - expected).norm() <= 0.03 * expected.norm()


def test_the_import_of_bitsandbytes_asks_no_hub_for_kernels_and_brings_no_compiler(tmp_path):
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    print('asked')\n")
    code = (
        "import qlora_lite.quant.small_batch, sys\n"
        "assert not {'kernels', 'torch._inductor.compile_fx', 'networkx'} & set(sys.modules)\n"
        "import kernels, torch._inductor.compile_fx"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
