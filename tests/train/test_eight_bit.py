"""The 8-bit optimizers of a CPU are bitsandbytes', bit for bit: weights, states and what a checkpoint holds."""

import bitsandbytes.optim
import pytest
import torch

from qlora_lite.ops.shapes import planning_for
from qlora_lite.train import eight_bit
from qlora_lite.train.eight_bit import CpuAdamW8bit, CpuLion8bit
from qlora_lite.train.optim import build_optimizer

PAIRS = {"adamw": (CpuAdamW8bit, bitsandbytes.optim.AdamW8bit), "lion": (CpuLion8bit, bitsandbytes.optim.Lion8bit)}
# two in a batch, one that fills a batch, one whose last block is not whole, two more, one too small for 8 bits
SHAPES = (16, 640), (32, 256), (1536, 16), (5, 4099), (16, 384), (384, 16), (8, 8)
BATCH_VALUES = 20_000


def weights(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(parameters, step):
    """Give gradients of many magnitudes, zero in places, none at all to one weight in one step."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(number + step)
        gradient[0] = 0.0
        parameter.grad = None if (number, step) == (1, 2) else gradient.to(parameter.dtype)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_and_states_equal_those_of_bitsandbytes_after_every_step(name, dtype, weight_decay, monkeypatch):
    monkeypatch.setattr(eight_bit, "BATCH_VALUES", BATCH_VALUES)
    sides = [weights(dtype) for _ in range(2)]
    optimizers = [make(side, lr=0.01, weight_decay=weight_decay)
                  for make, side in zip(PAIRS[name], sides, strict=True)]  # fmt: skip
    for step in range(1, 6):
        for side, optimizer in zip(sides, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 / step
            give_gradients(side, step)
            optimizer.step()
        for ours, theirs in zip(*sides, strict=True):
            assert torch.equal(ours, theirs)
            states = [optimizer.state.get(p, {}) for optimizer, p in zip(optimizers, (ours, theirs), strict=True)]
            assert states[0].keys() == states[1].keys() and states[0]
            for key, value in states[0].items():
                other = states[1][key]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    kinds = [optimizers[0].state[p]["state1"].dtype for p in sides[0]]
    assert kinds == [torch.uint8] * 6 + [torch.float32]


def test_batches_hold_neighbours_of_one_type_that_were_updated_as_often(monkeypatch):
    monkeypatch.setattr(eight_bit, "BATCH_VALUES", 1000)
    sizes = [(400, torch.bfloat16, 1), (600, torch.bfloat16, 1), (1, torch.bfloat16, 1), (1, torch.float32, 1),
             (1, torch.float32, 2), (5000, torch.float32, 2), (1, torch.float32, 2)]  # fmt: skip
    parameters = [torch.empty(count, dtype=dtype) for count, dtype, _ in sizes]
    states = {p: {"step": step} for p, (_, _, step) in zip(parameters, sizes, strict=True)}
    batches = list(eight_bit._batches(list(enumerate(parameters)), states))
    assert [len(batch) for batch in batches] == [2, 1, 1, 1, 1, 1]
    assert [place for batch in batches for place, _ in batch] == list(range(len(sizes)))
    assert all(p is parameters[place] for batch in batches for place, p in batch)
    assert list(eight_bit._batches([], {})) == []


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"])
def test_a_plan_for_a_card_runs_the_card_s_operator_and_a_cpu_only_for_blocks_that_are_not_whole(name, monkeypatch):
    calls, real = [], bitsandbytes.functional.optimizer_update_8bit_blockwise
    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise",
                        lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))  # fmt: skip
    parameters = weights(torch.float32)
    optimizer = build_optimizer(parameters, name, 0.0, 0.0)
    give_gradients(parameters, 1)
    optimizer.step()
    assert len(calls) == 1
    with planning_for("cuda"):
        optimizer.step()
    assert len(calls) == 1 + 6


@pytest.mark.parametrize("name", PAIRS)
def test_batches_of_the_real_size_equal_single_updates(name):
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 8192)] * 5 + [(16, 32768)]  # two to a batch; the last fills one and more
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    sides = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    for make, side in zip(PAIRS[name], sides, strict=True):
        optimizer = make(side, lr=0.01)
        for parameter, gradient in zip(side, gradients, strict=True):
            parameter.grad = gradient
        for _ in range(2):
            optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*sides, strict=True))


def test_no_step_of_a_process_makes_the_packing_tables():
    eight_bit._nearest.cache_clear()
    parameters = [torch.nn.Parameter(torch.randn(64, 64))]
    optimizer = build_optimizer(parameters, "adamw_8bit", 0.0, 0.0)
    parameters[0].grad = torch.randn(64, 64)
    made = eight_bit._nearest.cache_info().misses
    optimizer.step()
    assert made == eight_bit._nearest.cache_info().misses == 2
