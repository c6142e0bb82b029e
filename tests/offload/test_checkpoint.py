"""Checkpointing changes what is kept, never a number."""

import gc
import weakref

import pytest
import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.offload import tile
from qlora_lite.offload.checkpoint import Checkpoint, Segments, Skipping, kept_result, product_or_placeholder

checkpoint = Checkpoint()


class Block(nn.Module):
    """Two outputs, dropout, and an input that is no tensor."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout, self.calls = nn.Linear(5, 5), nn.Dropout(0.5), 0

    def forward(self, x, factor, other=None):
        self.calls += 1
        y = self.dropout(torch.tanh(self.linear(x))) * factor
        return (y, y.sum()) if other is None else (y + other, y.sum())


def gradients(block, x, call, other=None):
    block.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    y, total = call(block, x, 3.0, other)
    (y.square().sum() + total).backward()
    return y, [x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_outputs_and_gradients_equal_those_of_the_plain_call(input_needs_grad):
    torch.manual_seed(0)
    block = Block()
    x, other = torch.randn(3, 5, requires_grad=input_needs_grad), torch.randn(3, 5)
    y, wanted = gradients(block, x, lambda block, *inputs: block(*inputs), other)
    x.grad = None
    block.calls = 0
    y_checkpointed, found = gradients(block, x, checkpoint, other)
    assert block.calls == 2
    assert torch.equal(y, y_checkpointed)
    for one, two in zip(wanted, found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_the_random_state_after_backward_is_the_one_before_it():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(3, 5)
    total = checkpoint(block, x, 1.0)[1]
    state = torch.get_rng_state()
    total.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_that_draws_in_some_calls_only_draws_the_same_again_in_each():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(3, 5, requires_grad=True)
    for share in (0.0, 0.5, 0.0, 0.5):
        block.dropout.p = share
        x.grad = None
        _, wanted = gradients(block, x, lambda block, *inputs: block(*inputs))
        wanted, x.grad = [grad.clone() for grad in wanted], None
        _, found = gradients(block, x, checkpoint)
        assert all(map(torch.equal, found, wanted)), share


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_no_random_state_is_saved_or_restored_in_backward_of_a_block_that_drew_nothing(share, monkeypatch):
    block, x, asked = Block(), torch.randn(3, 5), []
    block.dropout.p = share
    total = checkpoint(lambda x: tiled(block, x), x)
    get, put = torch.get_rng_state, torch.set_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: asked.append(1) or get())
    monkeypatch.setattr(torch, "set_rng_state", lambda state: asked.append(1) or put(state))
    total.backward()
    assert bool(asked) == (share > 0)


def tiled(block, x):
    return tile.tiled(lambda part: block(part, 1.0)[0], x, list(block.parameters()), 2).sum()


def test_only_the_inputs_are_saved_in_forward():
    saved = []
    block, x = Block(), torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        total = checkpoint(block, x, 1.0)[1]
        assert saved == [x.data_ptr()]
        total.backward()
    assert len(saved) > 2, "hooks set outside must see what the recomputation saves"


def test_a_block_that_trains_nothing_and_needs_no_input_gradient_is_passed_over():
    block, x = Block().requires_grad_(False), torch.randn(3, 5)
    y, total = checkpoint(block, x, 1.0)
    (y.sum() + total).backward()
    assert x.grad is None


class Standing(torch.autograd.Function):
    """A placeholder for ``3 * x``: its shape, no memory, and a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class Handing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def tripled(x, computed):
    gradient = Standing.apply(x)
    return product_or_placeholder(lambda: computed.append(1) or Handing.apply(gradient, x.detach()), gradient)


def adds(x, computed):
    return x + tripled(x.sin(), computed)


def adds_in_place(x, computed):
    y = tripled(x.sin(), computed)
    y += x
    return y


def squares(x, computed):
    return tripled(x.sin(), computed) ** 2


@pytest.mark.parametrize(("block", "times"), [(adds, [2, 1, 1]), (adds_in_place, [2, 2, 2]), (squares, [2, 2, 2])])
def test_the_last_product_is_left_out_from_the_second_time_where_it_is_only_added(block, times):
    run, x = Checkpoint(), torch.tensor([0.3, -0.8], requires_grad=True)
    expected = gradient(block(x, []), x)
    for count in times:
        computed = []
        assert torch.equal(gradient(run(block, x, computed), x), expected)
        assert len(computed) == count


def test_a_block_whose_like_could_leave_out_its_product_and_that_needs_it_runs_again():
    skipping, x = Skipping(), torch.tensor([0.3, -0.8], requires_grad=True)
    for block in (adds, adds, squares, adds):
        found = gradient(Checkpoint(skipping=skipping)(block, x, []), x)
        assert torch.equal(found, gradient(block(x, []), x))
    assert skipping.product == 0


def adds_twice(x, computed):
    return adds(adds(x, computed), computed)


def test_of_blocks_with_other_numbers_of_products_none_leaves_out_the_wrong_one():
    skipping, x = Skipping(), torch.tensor([0.3, -0.8], requires_grad=True)
    for block in (adds, adds, adds_twice, adds, adds_twice):
        found = gradient(Checkpoint(skipping=skipping)(block, x, []), x)
        assert torch.equal(found, gradient(block(x, []), x))


class KeptExp(torch.autograd.Function):
    """exp(x), with x saved and the value kept."""

    @staticmethod
    def forward(ctx, x, calls):
        ctx.save_for_backward(x)
        return kept_result(lambda: calls.append("exp") or x.exp()).detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.exp(), None


def exponentials(x, calls):
    return KeptExp.apply(KeptExp.apply(x, calls).sin(), calls).sin()


def gradient(y, x):
    return torch.autograd.grad(y.sum(), x)[0]


def test_kept_results_are_computed_once_and_the_gradient_is_that_without_a_checkpoint():
    x, calls = torch.tensor([0.1, -0.7], requires_grad=True), []
    found = gradient(checkpoint(exponentials, x, calls), x)
    assert len(calls) == 2
    assert torch.equal(found, gradient(exponentials(x, []), x))


def test_each_of_several_open_blocks_has_its_own_results():
    x = torch.tensor([0.1, -0.7], requires_grad=True)
    inner, other = checkpoint(exponentials, x, []), checkpoint(exponentials, x + 1, [])
    found = gradient(checkpoint(exponentials, inner, []) + other, x)
    assert torch.equal(found, gradient(exponentials(exponentials(x, []), []) + exponentials(x + 1, []), x))


def test_without_a_checkpoint_every_call_computes():
    calls = []
    exponentials(torch.ones(2), calls)
    exponentials(torch.ones(2), calls)
    assert len(calls) == 4


class Layer(Block):
    """One output."""

    def forward(self, x):
        return super().forward(x, 0.7)[0]


LAYERS = 5


def in_segments(length):
    segments = Segments(length, LAYERS)
    return [Checkpoint(number, segments=segments) for number in range(LAYERS)]


def through(layers, x, calls, between=lambda number, x: x):
    torch.manual_seed(7)
    for number, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        x = between(number, call(layer, x))
    return x


def all_gradients(layers, x, *how):
    layers.zero_grad(set_to_none=True)
    x.grad = None
    through(layers, x, *how).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in layers.parameters())]


PLAIN_CALLS = [lambda layer, x: layer(x)] * LAYERS


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(LAYERS))


@pytest.mark.parametrize("input_needs_grad", [True, False])
@pytest.mark.parametrize("between", [lambda n, x: x, lambda n, x: 2 * x if n == 3 else x], ids=["nothing", "a product"])
@pytest.mark.parametrize("length", [2, 3, LAYERS, LAYERS + 1])
def test_stretches_of_layers_change_no_bit(layers, length, between, input_needs_grad):
    x = torch.randn(3, 5, requires_grad=input_needs_grad)
    expected = all_gradients(layers, x, PLAIN_CALLS, between)
    calls = in_segments(length)
    for _ in range(2):  # the second time from a new beginning
        for layer in layers:
            layer.calls = 0
        for one, other in zip(all_gradients(layers, x, calls, between), expected, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        assert [layer.calls for layer in layers] == [2] * LAYERS


@pytest.mark.parametrize(("length", "inputs"), [(1, 5), (2, 3), (3, 2), (LAYERS, 1)])
def test_a_stretch_saves_the_input_of_its_first_layer(layers, length, inputs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        through(layers, torch.randn(3, 5), in_segments(length))
    assert len(saved) == inputs


def test_an_output_that_something_else_reads_too_is_an_error_and_no_wrong_gradient(layers):
    seen = []
    out = through(layers, torch.randn(3, 5), in_segments(LAYERS), lambda n, x: seen.append(x) or x)
    with pytest.raises(
        ModelError, match=r"read by more than the block after it: set memory\.layers_per_checkpoint to 1"
    ):
        (out.sum() + seen[2].sum()).backward()


def test_a_forward_without_a_backward_leaves_nothing_alive(layers):
    x = torch.randn(3, 5) * 1.0
    kept = weakref.ref(x)
    gc.disable()
    try:
        out = through(layers, x, in_segments(2))
        del x
        assert kept() is not None
        del out
        assert kept() is None
    finally:
        gc.enable()
