"""LoRA+ gives the matrices B a learning rate of their own, with every optimizer; a ratio of 1 is as without it."""

from itertools import islice

import bitsandbytes.optim
import pytest
import torch
from jobs import new_job
from test_flat import OPTIMIZERS, assert_same, give_gradients, weights
from tiny import config_of
from tiny_trainer import trainer

from qlora_lite.adapters.lora.inject import lora_parameters
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.errors import TrainingError
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning import simulate
from qlora_lite.train import flat
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.optim import BITSANDBYTES_NAMES, build_optimizer, set_learning_rate
from qlora_lite.train.state import STATE, capture, restore

RATIOS = [1.0, 16.0] * 4


def theirs_of(name, parameters):
    """The optimizer that is not this package's, with two groups of parameters."""
    groups = [{"params": parameters[0::2], "lr": 0.01}, {"params": parameters[1::2], "lr": 0.16}]
    own = (
        torch.optim.AdamW
        if name == "adamw_torch"
        else (getattr(bitsandbytes.optim, BITSANDBYTES_NAMES[name.removeprefix("paged_")]))
    )
    return own(groups, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_group_is_updated_as_by_an_optimizer_with_two_rates(name, dtype, monkeypatch):
    monkeypatch.setattr(flat, "CHUNK_VALUES", {"cpu": 20_000})
    ours, theirs = weights(dtype), weights(dtype)
    optimizers = build_optimizer(ours, name, 0.0, 0.1, False, RATIOS), theirs_of(name, theirs)
    set_learning_rate(optimizers[0], 0.01)
    for step in range(1, 4):
        for side, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(side, step)
            optimizer.step()
        assert_same(ours, optimizers[0], theirs, optimizers[1])


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_b_learns_at_its_own_rate_and_the_rest_as_before(optimizer):
    settings = dict(optimizer=optimizer, rank=64, max_steps=1, stochastic_rounding=False, dora=True)
    plain, plus = (trainer(**settings, loraplus_lr_ratio=ratio) for ratio in (1.0, 4.0))
    begun = {name: p.detach().clone() for name, p in lora_parameters(plain.model)}
    (step,), (other,) = list(plain), list(plus)
    assert (step.loss, step.learning_rate) == (other.loss, other.learning_rate)
    one, four = dict(lora_parameters(plain.model)), dict(lora_parameters(plus.model))
    assert {name: p.data_ptr() for name, p in four.items()} == {
        name: p.data_ptr() for name, p in zip(plus.names, plus.parameters, strict=True)
    }
    for name, start in begun.items():
        if name.endswith("lora_B"):
            assert torch.allclose(four[name] - start, 4 * (one[name] - start), rtol=1e-4)
        else:
            assert torch.equal(four[name], one[name])
    assert len(plain.optimizer.param_groups) == 1 and len(plus.optimizer.param_groups) == 2


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "lion_8bit"])
def test_updates_in_backward_are_the_same_steps(optimizer):
    settings = dict(
        optimizer=optimizer, rank=64, loraplus_lr_ratio=8.0, max_grad_norm=0.0, gradient_accumulation_steps=1
    )
    plain, in_backward = trainer(**settings), trainer(**settings, options=MemoryOptions(optimizer_in_backward=True))
    for one, other in zip(plain, in_backward, strict=True):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, in_backward.parameters, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
def test_killed_and_resumed_it_goes_on_to_the_bit(optimizer):
    settings = dict(optimizer=optimizer, dtype=torch.bfloat16, rank=64, loraplus_lr_ratio=16.0, lr_scheduler="cosine")
    whole = trainer(**settings)
    steps = list(whole)
    first, resumed = trainer(**settings), trainer(**settings)
    first.probe_memory()
    begun = list(islice(first, 2))
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [metrics.loss for metrics in (*begun, *resumed)] == [metrics.loss for metrics in steps]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def test_the_plan_is_what_a_step_on_real_tensors_needs(monkeypatch):
    monkeypatch.setattr(flat, "CHUNK_VALUES", {"cpu": 10_000})
    config = config_of("llama", num_hidden_layers=7)
    rows = BatchShape((20, 11), 29)
    job = new_job(config, rows, rows, rank=32, compute_dtype=torch.float32, loraplus_lr_ratio=16.0)
    planned, real = (simulate._run(job, device, False) for device in (simulate.META, simulate.CPU))
    assert planned.moments == real.moments
    assert simulate.simulate(job).peak() == planned.peak()
    assert {each.lr_ratio for each in planned.trained} == {1.0, 16.0}


def test_a_method_without_such_weights_refuses_a_ratio():
    assert AdapterMethod().lr_ratios(["scale"], 1.0) == [1.0]
    with pytest.raises(TrainingError, match=r"train\.loraplus_lr_ratio 16 is for LoRA weights: set it to 1"):
        AdapterMethod().lr_ratios(["scale"], 16.0)
