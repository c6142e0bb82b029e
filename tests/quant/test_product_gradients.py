"""The gradient of a frozen product, where anybody takes it."""

import pytest
import torch

from qlora_lite.quant import product as module
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.nf4 import quantize
from qlora_lite.quant.product import FrozenMatmul


@pytest.mark.parametrize("wants_x", [True, False])
def test_an_input_that_wants_no_gradient_costs_no_product(wants_x, monkeypatch):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layer = QuantLinear.from_packed(quantize(weight), (64, 64), None, "nf4", torch.float32)
    spec, tensors = frozen_weight(layer)
    x, addend = torch.randn(3, 64, requires_grad=wants_x), torch.randn(3, 64, requires_grad=True)
    y = FrozenMatmul.apply(x, addend, None, spec, *tensors)
    products, compute = [], module.product
    monkeypatch.setattr(module, "product", lambda *given, **options: products.append(1) or compute(*given, **options))
    y.sum().backward()
    assert len(products) == wants_x and torch.equal(addend.grad, torch.ones(3, 64))
    assert (x.grad is not None) == wants_x
