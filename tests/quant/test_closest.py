"""Codes that are chosen for given inputs: no change of one of them, or of a step, makes their products better."""

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quants

from qlora_lite.quant import closest
from qlora_lite.quant.closest import closest_q4_0
from qlora_lite.quant.formats import FORMATS

Q4_0 = GGMLQuantizationType.Q4_0


def of_shape(out, columns):
    """A weight, and inputs that are alike."""
    generator = torch.Generator().manual_seed(out)
    inputs = torch.randn(400, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    inputs += 0.3 * torch.randn(400, columns, generator=generator)
    return 0.02 * torch.randn(out, columns, generator=generator), inputs


@pytest.mark.parametrize("shape", [(16, 96), (40, 160)])
def test_no_change_of_a_single_code_or_step_is_better(shape, monkeypatch):
    monkeypatch.setattr(closest, "SWEEPS", 30)
    weight, inputs = of_shape(*shape)
    gram, (out, columns) = inputs.t() @ inputs, shape
    damping = closest.DAMPING * gram.diagonal().mean().double()

    def error(found):
        off = found.double() - weight
        return (inputs.double() @ off.t()).square().sum(0) + damping * off.square().sum(1)

    blocks = closest_q4_0(weight, gram)
    found = torch.from_numpy(dequantize(blocks.numpy(), Q4_0))
    assert torch.equal(found, FORMATS["q4_0"].dequantize([blocks], shape, torch.float32))
    rounded = torch.from_numpy(dequantize(quants.quantize(weight.numpy(), Q4_0), Q4_0))
    assert error(found).sum() < 0.1 * error(rounded).sum()
    least = error(found) * (1 - 1e-5)  # codes times steps are rounded
    steps = blocks.view(out, -1, 18)[..., :2].contiguous().view(torch.float16).float().squeeze(-1)
    codes = found.view(out, -1, 32) / steps.unsqueeze(-1)
    for column in range(0, columns, 7):
        for move in (-1, 1):
            changed = codes.clone()
            one = changed.view(out, columns)[:, column]
            one.add_(move).clamp_(-8, 7)
            assert (error((changed * steps.unsqueeze(-1)).view(shape)) >= least).all()
    for block in range(columns // 32):
        for share in (0.99, 1.01):
            changed = steps.clone()
            changed[:, block] *= share
            assert (error((codes * changed.unsqueeze(-1)).view(shape)) >= least).all()


def test_a_weight_that_is_on_the_grid_and_one_of_zeros_stay():
    weight, inputs = of_shape(24, 64)
    weight = torch.from_numpy(dequantize(quants.quantize(weight.numpy(), Q4_0), Q4_0))
    weight[3:5] = 0
    found = closest_q4_0(weight, inputs.t() @ inputs)
    assert torch.equal(FORMATS["q4_0"].dequantize([found], (24, 64), torch.float32), weight)


def test_what_is_given_stays():
    weight, inputs = of_shape(8, 64)
    gram = inputs.t() @ inputs
    before = weight.clone(), gram.clone()
    closest_q4_0(weight, gram)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])
