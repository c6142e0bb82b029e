"""A model whose weights are read when they are needed gives the logits of the model in memory, and keeps none."""

import pytest
import torch
from tiny import ARCHITECTURES, build_tiny, random_factors
from tiny_runs import logits

from qlora_lite.adapters.files import attach_adapter, detach_adapter
from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.models.streamed import _read_around_forward, streamed_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_it_gives_the_same_logits_with_and_without_an_adapter(model_type, tied):
    whole = build_tiny(model_type, tie_word_embeddings=tied)
    weights, asked = dict(whole.named_parameters()), []

    def read(name):
        asked.append(name)
        return weights[name].detach().clone()

    streamed = streamed_model(whole.config, read)
    assert torch.allclose(logits(streamed), logits(whole), atol=1e-6)
    assert set(asked) == weights.keys()
    assert all(parameter.is_meta for parameter in streamed.parameters()), "nothing is kept"

    adapted = add_lora(build_tiny(model_type, tie_word_embeddings=tied), rank=3, alpha=6.0, dtype=torch.float32)
    random_factors(adapted)
    factors = {n: Factors(layer.lora_A.detach(), layer.lora_B.detach(), 6.0) for n, layer in lora_layers(adapted)}
    found = logits(attach_adapter(streamed, Adapter(factors, 0.0)))
    assert torch.allclose(found, logits(adapted), atol=1e-5)
    assert not torch.allclose(found, logits(whole), atol=1e-2)
    assert torch.allclose(logits(detach_adapter(streamed)), logits(whole), atol=1e-6)


def test_no_more_than_one_block_is_held():
    whole = build_tiny("llama", num_hidden_layers=4)
    weights, most = dict(whole.named_parameters()), []

    def place(name):
        return name.split(".")[2] if ".layers." in name else name

    def read(name):
        held = {place(other) for other, parameter in streamed.named_parameters() if not parameter.is_meta}
        most.append(len(held | {place(name)}))
        return weights[name].detach().clone()

    streamed = streamed_model(whole.config, read)
    logits(streamed)
    assert len(most) == len(weights) and max(most) == 1


def test_a_module_around_others_reads_what_is_its_own():
    class Around(torch.nn.Module):
        """A module with a parameter and a layer."""

        def __init__(self):
            super().__init__()
            self.offset = torch.nn.Parameter(torch.empty(3, device="meta"))
            self.layer = torch.nn.Linear(3, 3, device="meta")

        def forward(self, x):
            assert self.layer.weight.is_meta
            return x + self.offset

    module, asked = Around(), []
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    _read_around_forward(module, [module], names, lambda name: asked.append(name) or torch.ones(3))
    assert torch.equal(module(torch.zeros(3)), torch.ones(3))
    assert asked == ["offset"] and module.offset.is_meta
