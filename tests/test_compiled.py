"""torch.compile takes a block as one graph, 4-bit layers and all, and its gradients are those of the block."""

import pytest
import torch
from tiny import build_tiny, random_batch
from torch import nn

from qlora_lite.lora.inject import add_lora, lora_layers, lora_parameters
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.load import adopt
from qlora_lite.models.quantizer import quantize_in_place
from qlora_lite.train.step import hidden_states, prepare

CPU = torch.device("cpu")


def first_block(model_type):
    """A 4-bit block with factors that do something, and what a batch of three rows calls it with."""
    model = build_tiny(model_type)
    quantize_in_place(model, "nf4", True)
    add_lora(adopt(model), rank=4)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    block, found = blocks(model)[0], []
    handle = block.register_forward_pre_hook(lambda _, *arguments: found.append(arguments), with_kwargs=True)
    with torch.no_grad():
        hidden_states(model.train(), prepare(random_batch(), CPU))
    handle.remove()
    (x,), kwargs = found[0]
    return block, x, kwargs


def gradients(call, block, x, kwargs):
    x = x.detach().requires_grad_()
    y = call(x, **kwargs)
    grads = torch.autograd.grad(y.square().sum(), [x, *(factor for _, factor in lora_parameters(block))])
    return [y.detach(), *grads]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 does it itself
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_a_block_is_one_graph_with_the_block_s_gradients(model_type):
    block, x, kwargs = first_block(model_type)
    expected = gradients(block, block, x, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=False)  # a break is an error
    for found, wanted in zip(gradients(compiled, block, x, kwargs), expected, strict=True):
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()
