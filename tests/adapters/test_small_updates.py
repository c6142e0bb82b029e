"""In bf16 an update far below one step of the output still counts: it is rounded together with the base product."""

import pytest
import torch
from tiny import PlainLora
from torch import nn

from qlora_lite.adapters.lora.layer import LoraLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("path", [LoraLinear, PlainLora])
def test_a_small_update_shifts_the_mean_of_the_rounded_output_by_its_own_size(bias, path):
    torch.manual_seed(0)
    base = nn.Linear(64, 128, bias=bias, dtype=torch.bfloat16)
    layer = path(base, 4, 4.0, 0.0, False, torch.bfloat16)
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = layer(x).double()
        layer.lora_B.normal_(std=2e-4)
        update = x.double() @ layer.lora_A.double().t() @ layer.lora_B.double().t()
        seen = layer(x).double() - plain
    steps = (torch.finfo(torch.bfloat16).eps * plain.abs()).mean()
    assert update.abs().mean() < 0.1 * steps
    kept = (seen * update).sum() / (update * update).sum()  # 1 if the update arrives whole on average, 0 if it is lost
    assert kept.item() == pytest.approx(1.0, abs=0.15)
