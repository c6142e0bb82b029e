"""Factors updated together have bitsandbytes' bits, one by one: weights, states and what a checkpoint holds."""

import bitsandbytes.optim
import pytest
import torch
from counted import counted

from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.planning.simulate import META
from qlora_lite.quant.blockwise import BLOCK_VALUES
from qlora_lite.quant.tensor_file import write_tensors
from qlora_lite.train import eight_bit, flat
from qlora_lite.train.gradients import clip_scale, gradient_norms
from qlora_lite.train.optim import BITSANDBYTES_NAMES, build_optimizer
from qlora_lite.train.state import _host_copy

OPTIMIZERS = [*BITSANDBYTES_NAMES, "adamw_torch"]
# two in a chunk, one that is a chunk, one whose last block is not whole, two more, two too small for 8 bits
SHAPES = (16, 640), (32, 256), (1536, 16), (5, 4099), (16, 384), (384, 16), (8, 8), (3, 5)
CHUNKS = [[0, 1], [2], [3], [4, 5], [6, 7]]
PIECE = 20_000 // BLOCK_VALUES * BLOCK_VALUES  # values of a larger one that are updated at once
PIECES = len(CHUNKS) + 2  # two of them are larger than a piece
PLACES = [0, 1, 2, 4, 6, 7, 8, 9]  # of the noise: one for each weight, and for each further piece of it


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(flat, "CHUNK_VALUES", {"cpu": 20_000, "cuda": 20_000})


def weights(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def give_gradients(parameters, step, lacking=()):
    """Give gradients of many magnitudes, zero in places, none at all to some weights in the second step."""
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** -(number + step)
        gradient[0] = 0.0
        parameter.grad = None if number in lacking and step == 2 else gradient.to(parameter)


def bitsandbytes_own(name, parameters, weight_decay):
    own = getattr(bitsandbytes.optim, BITSANDBYTES_NAMES[name.removeprefix("paged_")])
    return own(parameters, lr=0.01, weight_decay=weight_decay)


def assert_same(parameters, optimizer, others, other_optimizer):
    for ours, theirs in zip(parameters, others, strict=True):
        assert torch.equal(ours, theirs)
        state, expected = optimizer.state.get(ours, {}), other_optimizer.state.get(theirs, {})
        assert state.keys() == expected.keys()
        for key, value in state.items():
            same = torch.equal if torch.is_tensor(value) else lambda a, b: a == b
            assert same(value, expected[key]) and getattr(value, "dtype", 0) == getattr(expected[key], "dtype", 0)


@pytest.mark.parametrize("name", BITSANDBYTES_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("weight_decay", "lacking"), [(0.0, ()), (0.1, (1, 3, 6))])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_weights_and_states_equal_those_of_bitsandbytes_after_every_step(
    name, dtype, weight_decay, lacking, device_type
):
    sides = [weights(dtype) for _ in range(2)]
    optimizers = (
        build_optimizer(sides[0], name, 0.01, weight_decay, stochastic_rounding=False),
        bitsandbytes_own(name, sides[1], weight_decay),
    )
    for step in range(1, 5):
        for side, optimizer in zip(sides, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 / step
            give_gradients(side, step, lacking)
            with planning_for(device_type):
                optimizer.step()
        assert_same(sides[0], optimizers[0], sides[1], optimizers[1])
    kinds = [optimizers[0].state[p]["state1"].dtype for p in sides[0]]
    assert kinds == [torch.uint8 if "8bit" in name else torch.float32] * 6 + [torch.float32] * 2


@pytest.mark.parametrize("name", BITSANDBYTES_NAMES)
def test_rounded_by_chance_they_are_bitsandbytes_own_of_float32_and_the_noise_of_each_chunk(name):
    parameters, reference = weights(torch.bfloat16), [p.detach().float() for p in weights(torch.bfloat16)]
    own = [torch.nn.Parameter(p.clone()) for p in reference]
    optimizer, theirs = build_optimizer(parameters, name, 0.01, 0.1), bitsandbytes_own(name, own, 0.1)
    for step in range(1, 4):
        give_gradients(parameters, step)
        for p, ours in zip(own, parameters, strict=True):
            p.grad = ours.grad.float()
        optimizer.step()
        theirs.step()
        for chunk in CHUNKS:
            sizes = [-(-own[n].numel() // BLOCK_VALUES) * BLOCK_VALUES for n in chunk]
            most, noise = sum(sizes) if len(chunk) > 1 else PIECE, []
            for piece, start in enumerate(range(0, sum(sizes), most)):
                generator = torch.Generator().manual_seed(step * 65_537 + PLACES[chunk[0]] + piece)
                drawn = torch.empty(min(most, sum(sizes) - start), dtype=torch.int32)
                noise.append(drawn.random_(0, 65536, generator=generator))
            noise = torch.cat(noise).split(sizes)
            for number, dropped in zip(chunk, noise, strict=True):
                p = own[number].data
                bits = p.view(-1).view(torch.int32) + dropped[: p.numel()]
                p.copy_((bits & -65536).view(torch.float32).view(p.shape))
                assert torch.equal(parameters[number].float(), p)


def everything(parameters, optimizer):
    if parameters[0].is_cuda:
        torch.cuda.synchronize()  # paged states are the host's too
    tensors = [tensor for p in parameters for tensor in (p.detach(), *optimizer.state[p].values())]
    return [t.clone() if torch.is_tensor(t) else t for t in tensors]


def all_equal(one, other):
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(one, other, strict=True))


def assert_left_out_where_not_finite(name, rounding, device):
    parameters, same = weights(torch.bfloat16, device), weights(torch.bfloat16, device)
    optimizer, other = (build_optimizer(side, name, 0.01, 0.1, rounding) for side in (parameters, same))
    half = torch.tensor(0.5, device=device)
    for step, bad in enumerate((None, torch.nan, torch.inf, -torch.inf), 1):
        before = everything(parameters, optimizer) if bad else None
        give_gradients(parameters, step)
        if bad:
            parameters[2].grad[3] = bad
        optimizer.step(if_finite=torch.tensor([1.0, bad or 2.0], device=device), scale=half * (bad or 1.0))
        if bad:
            optimizer.forget_step()
            assert all_equal(everything(parameters, optimizer), before)
    give_gradients(parameters, 5)
    optimizer.step(if_finite=torch.ones(2, device=device))
    for step in (1, 5):
        give_gradients(same, step)
        other.step(scale=half if step == 1 else None)
    assert all_equal(everything(parameters, optimizer), everything(same, other))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_step_whose_numbers_are_not_finite_leaves_everything(name, rounding, device_type):
    with planning_for(device_type):  # as if on a GPU, which looks by itself
        assert_left_out_where_not_finite(name, rounding, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rounding", [True, False])
def test_a_step_whose_numbers_are_not_finite_leaves_everything_on_a_gpu(name, rounding):
    assert_left_out_where_not_finite(name, rounding, "cuda")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_scaled_in_the_type_of_the_update(name):
    parameters, same = weights(torch.float32), weights(torch.float32)
    optimizers = [build_optimizer(side, name, 0.01, 0.0) for side in (parameters, same)]
    for side in (parameters, same):
        give_gradients(side, 1)
    norm = torch.linalg.vector_norm(gradient_norms(parameters))
    optimizers[0].step(scale=clip_scale(norm, 0.01))
    torch.nn.utils.clip_grad_norm_(same, 0.01)
    optimizers[1].step()
    assert all(torch.allclose(ours, theirs, atol=1e-7) for ours, theirs in zip(parameters, same, strict=True))


def test_weights_of_a_chunk_lie_end_to_end_and_come_back_to_each_other():
    parameters = weights(torch.bfloat16)
    values = [p.detach().clone() for p in parameters]
    optimizer = build_optimizer(parameters, "adamw_8bit", 0.0, 0.0)
    for moved in (None, 1, 3, 7):
        if moved is not None:
            parameters[moved].data = parameters[moved].detach().clone()
        give_gradients(parameters, 1)
        optimizer.step()
        for chunk in CHUNKS:
            storages = {parameters[n].untyped_storage().data_ptr() for n in chunk}
            assert len(storages) == 1
            assert all(parameters[n].storage_offset() % BLOCK_VALUES == 0 for n in chunk)
        assert all(map(torch.equal, parameters, values))


def test_what_is_saved_of_weights_and_states_has_their_bytes_and_no_more(tmp_path):
    parameters = weights(torch.bfloat16)
    optimizer = build_optimizer(parameters, "adamw_8bit", 0.01, 0.0)
    give_gradients(parameters, 1)
    optimizer.step()
    write_tensors(tmp_path / "factors", {str(number): p.detach() for number, p in enumerate(parameters)})
    assert (tmp_path / "factors").stat().st_size < sum(p.nbytes for p in parameters) + 1024
    copies = [_host_copy(optimizer.state[p][key]) for p in parameters[:6] for key in ("state1", "absmax2")]
    assert all(copy.untyped_storage().nbytes() == copy.nbytes for copy in copies)


def test_two_optimizers_of_the_same_weights_do_not_disturb_each_other():
    sides = [weights(torch.bfloat16) for _ in range(2)]
    first, alone = (build_optimizer(side, "adamw_8bit", 0.01, 0.1) for side in sides)
    for step in range(1, 3):
        for side, optimizer in zip(sides, (first, alone), strict=True):
            give_gradients(side, step)
            optimizer.step()
        second = build_optimizer(sides[0], "adamw_8bit", 0.0, 0.0)  # as a memory probe has
        second.step()
    assert_same(sides[0], first, sides[1], alone)


@pytest.mark.parametrize(
    ("name", "calls_of_a_cpu"),
    [
        ("adamw_8bit", 1),
        ("paged_adamw_8bit", 1),
        ("lion_8bit", 1),
        ("adamw_32bit", PIECES),
    ],
)
def test_each_piece_is_one_call_which_on_a_cpu_is_bitsandbytes_own_for_32_bit_states(name, calls_of_a_cpu, monkeypatch):
    calls = []
    for function in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        real = getattr(bitsandbytes.functional, function)
        monkeypatch.setattr(
            bitsandbytes.functional,
            function,
            lambda *args, real=real, **kwargs: calls.append(args) or real(*args, **kwargs),
        )
    parameters = weights(torch.float32)
    optimizer = build_optimizer(parameters, name, 0.0, 0.0)
    give_gradients(parameters, 1)
    optimizer.step()
    assert len(calls) == calls_of_a_cpu
    with planning_for("cuda"):
        optimizer.step()
    assert len(calls) == calls_of_a_cpu + PIECES


def test_no_step_of_a_process_makes_the_packing_tables():
    eight_bit._nearest.cache_clear()
    parameters = [torch.nn.Parameter(torch.randn(64, 64))]
    optimizer = build_optimizer(parameters, "adamw_8bit", 0.0, 0.0)
    parameters[0].grad = torch.randn(64, 64)
    made = eight_bit._nearest.cache_info().misses
    optimizer.step()
    assert made == eight_bit._nearest.cache_info().misses == 2


@pytest.mark.parametrize(("name", "most"), [("adamw_8bit", 28), ("lion_8bit", 28), ("adamw_32bit", 28)])
def test_a_gpu_is_given_few_operations_to_update_an_8b_model(name, most, monkeypatch):
    """Of r = 16 on all linear layers of Llama-3.1-8B: clipping and update are as many for 448 factors as for two."""
    monkeypatch.undo()
    sizes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    shapes = [shape for inside, outside in sizes * 32 for shape in ((16, inside), (outside, 16))]
    parameters = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device=META)) for shape in shapes]
    with planning_for("cuda"):
        optimizer = build_optimizer(parameters, name, 1e-4, 0.0)
        for p in parameters:
            p.grad = torch.empty_like(p)
        optimizer.step()
        with counted() as counter, phase("forward"):  # whose operations are counted
            norms = gradient_norms(parameters)
            numbers = torch.stack([norms[0], torch.linalg.vector_norm(norms)])
            optimizer.step(if_finite=numbers, scale=clip_scale(numbers[1], 1.0))
    profiler = 2  # torch's own, around a step
    assert len(parameters) == 448 and counter.work.operations <= most + profiler
