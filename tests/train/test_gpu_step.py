"""On a card: the same step as on a CPU, and memory as planned. Needs a CUDA device."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import quantized_pair, random_batch, random_factors
from transformers import AutoConfig

from qlora_lite.lora.inject import add_lora, lora_parameters
from qlora_lite.models.levers import Levers, set_levers
from qlora_lite.planning.predict import predict
from qlora_lite.planning.simulate import Job, rows_of
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.rehearsal import rehearse_step
from qlora_lite.train.step import accumulate_gradients, prepare

pytestmark = pytest.mark.gpu


def with_gradients(model, batch):
    set_levers(model.train(), Levers())
    loss = accumulate_gradients(model, [prepare(batch, model.device)], chunk_tokens=8).item()
    return loss, [parameter.grad.cpu() for _, parameter in lora_parameters(model)]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_loss_and_gradients_on_a_card_are_those_on_a_cpu(model_type):
    model, _ = quantized_pair(model_type)
    add_lora(model, rank=3, alpha=6.0, dtype=torch.float32)
    random_factors(model)
    batch = random_batch()
    loss, gradients = with_gradients(copy.deepcopy(model).to("cuda"), batch)
    expected, wanted = with_gradients(model, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    for found, other in zip(gradients, wanted, strict=True):
        assert (found - other).norm() <= 1e-3 * other.norm() + 1e-7


def test_allocated_memory_is_what_the_plan_says():
    sizes = dict(vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
                 num_key_value_heads=8)  # fmt: skip
    model, _ = quantized_pair("llama", dtype=torch.bfloat16, **sizes)
    model = add_lora(model, rank=16).to("cuda")
    set_levers(model, Levers())
    batch = random_batch((2048,), vocabulary=8192)
    job = Job(AutoConfig.for_model("llama", **sizes), rows_of(batch), None, "cuda")
    parameters = [parameter for _, parameter in lora_parameters(model)]
    optimizer = build_optimizer(parameters, job.optimizer, 0.0, 0.0)
    torch.cuda.reset_peak_memory_stats()
    rehearse_step(model, parameters, optimizer, prepare(batch, model.device), None, 1.0, None, False)
    measured = torch.cuda.max_memory_allocated()
    predicted = predict(replace(job, config=model.config)).allocated_bytes
    assert -0.01 <= predicted / measured - 1 <= 0.05
