"""The optimizers by name: bitsandbytes' own bits, without its waits."""

import bitsandbytes.optim
import pytest
import torch

from qlora_lite.train.optim import BITSANDBYTES_NAMES, build_optimizer, can_page
from qlora_lite.train.state import _host_copy

SHAPES = (8, 8), (64, 65), (512, 256)  # 32-bit states; blocks that are not whole; paged where states can be


def factors(device="cpu", dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=random) for shape in SHAPES]
    return [torch.nn.Parameter(tensor.to(device, dtype)) for tensor in made]


def run(optimizer, parameters, steps=3):
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters[:-1]:
            p.grad = torch.randn(p.shape, generator=random).to(p)
        parameters[-1].grad = torch.ones_like(parameters[-1])
        optimizer.step()


def states_of(optimizer, parameters):
    if parameters[0].is_cuda:
        torch.cuda.synchronize()  # paged ones are the host's too
    return [
        {key: _host_copy(value) if torch.is_tensor(value) else value for key, value in optimizer.state[p].items()}
        for p in parameters
    ]


def assert_bitsandbytes_own(name, device):
    ours, own = factors(device), factors(device)
    optimizer = build_optimizer(ours, name, 0.01, 0.1, stochastic_rounding=False)
    used = name if can_page(ours[0].device) else name.removeprefix("paged_")
    theirs = getattr(bitsandbytes.optim, BITSANDBYTES_NAMES[used])(own, lr=0.01, weight_decay=0.1)
    run(optimizer, ours)
    run(theirs, own)
    assert all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))
    for found, expected in zip(states_of(optimizer, ours), states_of(theirs, own), strict=True):
        assert found.keys() == expected.keys() and found["step"] == expected["step"] == 3
        assert all(torch.equal(found[key], expected[key]) for key in found if key != "step")


@pytest.mark.parametrize("name", BITSANDBYTES_NAMES)
def test_weights_and_states_are_those_of_bitsandbytes(name):
    assert_bitsandbytes_own(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITSANDBYTES_NAMES)
def test_weights_and_states_are_those_of_bitsandbytes_on_a_gpu(name):
    assert_bitsandbytes_own(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("name", BITSANDBYTES_NAMES)
def test_the_host_does_not_wait_for_a_gpu_in_a_step(name, rounding, monkeypatch):
    parameters = factors("cuda", torch.bfloat16)
    optimizer = build_optimizer(parameters, name, 0.01, 0.1, rounding)
    run(optimizer, parameters, steps=1)
    waits, wait = [], torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waits.append(1) or wait(*device))
    optimizer.step()
    assert not waits
    torch.cuda.synchronize()
    assert waits
