"""Updates too small for bfloat16 count on average, and the way of weights depends on nothing but place and step."""

import pytest
import torch

from qlora_lite.train.optim import BITSANDBYTES_NAMES, build_optimizer
from qlora_lite.train.rounding import in_float32, round_stochastically

OPTIMIZERS = [*BITSANDBYTES_NAMES, "adamw_torch"]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def rounded(values, step=1, place=0):
    found = round_stochastically(values.clone(), step, place)
    assert found.dtype == torch.bfloat16
    return found


@pytest.mark.parametrize("value", [1 + 2**-9, -(1 + 2**-10), 3.0e-39, 1.2345e-12, -6.54321e20])
def test_a_value_becomes_one_of_its_neighbours_and_itself_on_average(value):
    count = 200_000
    found = rounded(torch.full((count,), value, dtype=torch.float32)).double()
    lower, upper = found.min(), found.max()
    near = torch.tensor(value, dtype=torch.bfloat16)
    assert len(found.unique()) == 2 and lower < torch.tensor(value).double() < upper
    assert near in (lower, upper)
    deviation = (upper - lower) / 2 / count**0.5
    assert abs(found.mean() - torch.tensor(value).double()) < 5 * deviation


def test_what_bfloat16_can_hold_stays():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator).bfloat16()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=torch.bfloat16)
    for exact in (values, special):
        assert torch.equal(rounded(exact.float()).view(torch.int16), exact.view(torch.int16))
    assert rounded(torch.tensor([torch.nan])).isnan().all()


def test_values_are_rounded_the_same_way_again_and_another_way_later_or_elsewhere():
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(values, 7, 3), rounded(values.view(20, 15), 7, 3).view(-1))
    for step, place in ((8, 3), (7, 4)):
        assert not torch.equal(rounded(values, step, place), rounded(values, 7, 3))


def test_the_random_generators_of_the_run_are_left_alone():
    before = torch.get_rng_state()
    rounded(torch.randn(10, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def updated(name, stochastic, dtype=torch.bfloat16, steps=40, shape=(64, 64), device="cpu"):
    weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    optimizer = build_optimizer([weight], name, 1e-4, 0.0, stochastic)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert weight.dtype == weight.grad.dtype == dtype
    return weight.detach()


@pytest.mark.parametrize("shape", [(64, 64), (64, 65), (8, 8)])  # 8-bit states in whole blocks, not whole, 32-bit ones
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_updates_add_up_where_rounding_to_the_nearest_loses_all(name, shape):
    assert (updated(name, False, shape=shape) == 1).all()
    exact = updated(name, False, torch.float32, shape=shape)
    assert 1 - exact.mean() == pytest.approx(0.004, rel=0.02)
    deviation = 2**-8 / exact.numel() ** 0.5  # of the mean: each is within a step of bfloat16
    assert (updated(name, True, shape=shape).float().mean() - exact.mean()).abs() < 5 * deviation


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_update_is_that_of_float32_rounded(name):
    exact = updated(name, False, torch.float32, steps=1)
    assert torch.equal(updated(name, True, steps=1), rounded(exact.view(-1)).view(exact.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (512, 256)])  # the larger one is paged where states can be
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_gpu_too_an_update_is_that_of_float32_rounded(name, shape):
    exact = updated(name, False, torch.float32, steps=1, shape=shape, device="cuda")
    found = updated(name, True, steps=1, shape=shape, device="cuda")
    assert torch.equal(found, rounded(exact.view(-1)).view(shape))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_weights_are_updated_as_without(name):
    assert torch.equal(updated(name, True, torch.float32), updated(name, False, torch.float32))


def test_an_update_that_fails_leaves_the_factor():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    before, grad = weight.data_ptr(), weight.grad
    with pytest.raises(MemoryError), in_float32({0: weight}, lambda _: 1):
        assert weight.dtype == weight.grad.dtype == torch.float32
        weight.data.add_(1)
        raise MemoryError
    assert weight.data_ptr() == before and weight.grad is grad and (weight == 1).all()
