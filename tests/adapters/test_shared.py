"""Layers that share an input give what each gives by itself, and compute by themselves where they do not share it."""

import gc
import weakref

import pytest
import torch
from tiny import build_tiny
from torch import nn

from qlora_lite.adapters.lora.inject import Target, add_lora, lora_layers
from qlora_lite.adapters.lora.layer import LoraLinear, SharedInput
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.product import materialize

IN = 64
NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def shared_set(outs, dtype=torch.float32, bias=True):
    """Layers of two kinds, whose weights are other numbers of tensors."""
    torch.manual_seed(0)
    layers = []
    for number, out in enumerate(outs):
        base = QuantLinear.from_weight(torch.randn(out, IN), torch.randn(out) if bias else None, "nf4", True)
        base = base if number else nn.Linear(IN, out, bias=bias)
        layers.append(LoraLinear(base.to(dtype) if not number else base, 5, 7.0, 0.0, False, dtype))
        nn.init.normal_(layers[-1].lora_B)
    SharedInput(layers)  # held by its layers
    return layers


def check_against_formula(layers, x, used, tolerance=1e-6):
    """Compare the results of the layers, and all gradients of those that are used, with the formula in float64."""
    ys = [layer(x) for layer in layers]
    leaf, total, expected_total, leaves = x.detach().double().requires_grad_(), 0.0, 0.0, []
    for number, (layer, y) in enumerate(zip(layers, ys, strict=True)):
        factors = [f.detach().double().requires_grad_() for f in (layer.lora_A, layer.lora_B)]
        weight = materialize(*frozen_weight(layer.base), x.dtype).double()
        expected = leaf @ weight.t() + layer.scale * leaf @ factors[0].t() @ factors[1].t()
        expected = expected if layer.base.bias is None else expected + layer.base.bias.double()
        assert (y - expected).norm() <= tolerance * expected.norm()
        if number in used:
            upstream = torch.randn(y.shape, dtype=y.dtype)
            total = total + (y * upstream).sum()
            expected_total = expected_total + (expected * upstream.double()).sum()
            leaves += zip((layer.lora_A, layer.lora_B), factors, strict=True)
    total.backward()
    expected_total.backward()
    for found, wanted in ((x, leaf), *leaves):
        assert found.grad.dtype == found.dtype
        assert (found.grad - wanted.grad).norm() <= tolerance * wanted.grad.norm()
    for number, layer in enumerate(layers):
        assert (layer.lora_A.grad is None) == (number not in used)


@pytest.mark.parametrize("outs", [(80,), (80, 48), (80, 48, 32)])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_computed_together_equal_the_float64_formula(outs, bias):
    check_against_formula(shared_set(outs, bias=bias), torch.randn(2, 9, IN, requires_grad=True), range(len(outs)))


def test_in_bf16_the_error_is_that_of_bf16():
    """Measured 3.7e-3 at most over eight inputs; the unit roundoff of bf16 is 3.9e-3."""
    layers = shared_set((80, 48, 32), torch.bfloat16)
    check_against_formula(layers, torch.randn(1, 70, IN).bfloat16().requires_grad_(), range(3), 8e-3)


@pytest.mark.parametrize("used", [{0}, {2}, {0, 1}, {1, 2}])
def test_a_result_that_nobody_uses_gives_no_gradient(used):
    check_against_formula(shared_set((80, 48, 32)), torch.randn(9, IN, requires_grad=True), used)


def test_an_input_that_needs_no_gradient_gets_none():
    layers, x = shared_set((80, 48)), torch.randn(9, IN)
    sum(layer(x).sum() for layer in layers).backward()
    assert x.grad is None and all(layer.lora_A.grad is not None for layer in layers)


@pytest.mark.parametrize("order", [(1, 0), (1, 1), (0, 0, 1)])
def test_layers_called_otherwise_give_what_they_give_by_themselves(order):
    layers, (x, other) = shared_set((80, 48)), torch.randn(2, 9, IN)
    expected = [layer(x) for layer in shared_set((80, 48))]
    for number in order:
        assert torch.allclose(layers[number](x), expected[number], atol=1e-4)
    layers = shared_set((80, 48))
    layers[0](other)
    assert torch.allclose(layers[1](x), expected[1], atol=1e-4)
    assert layers[0].shared is layers[1].shared is None  # from now on each by itself
    assert torch.allclose(layers[0](x), expected[0], atol=1e-4)


@pytest.mark.parametrize("second", [True, False])
def test_nothing_of_a_call_is_held_on_to(second):
    layers, x = shared_set((80, 48)), torch.randn(9, IN)
    layers[0](x)
    layers[1](x if second else x.clone())
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_a_model_shares_inputs_where_it_has_separate_projections_and_keeps_its_gradients(model_type):
    together, apart = (add_lora(build_tiny(model_type), rank=4) for _ in range(2))
    ids = torch.arange(12)[None]
    for model in (together, apart):
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(len(layer.lora_B)))
            layer.shared = layer.shared if model is together else None
        model(ids).logits.float().square().mean().backward()
    shared = {name.rpartition(".")[2] for name, layer in lora_layers(together) if layer.shared is not None}
    assert shared == (set() if model_type == "phi3" else set(NAMES))
    for (name, layer), (_, other) in zip(lora_layers(together), lora_layers(apart), strict=True):
        for found, wanted in ((layer.lora_A.grad, other.lora_A.grad), (layer.lora_B.grad, other.lora_B.grad)):
            assert (found - wanted).norm() <= 2e-2 * wanted.norm(), name


@pytest.mark.parametrize(
    "options",
    [{"targets": ["q_proj", "k_proj"]}, {"dropout": 0.1}, {"targets": ["all-linear", Target("k_proj", 8)]}],
)
def test_layers_of_another_rank_or_with_dropout_or_missing_are_not_in_a_set(options):
    model = add_lora(build_tiny("llama"), **options)
    shared = {name.rpartition(".")[2] for name, layer in lora_layers(model) if layer.shared is not None}
    assert shared == ({"gate_proj", "up_proj"} if Target("k_proj", 8) in options.get("targets", ()) else set())
