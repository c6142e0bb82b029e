"""A checkpointed block keeps the results it was told to keep, and computes the others again."""

import torch
from torch.utils.checkpoint import checkpoint

from qlora_lite.ops.kept import keep_results, kept_result


def counting(calls, name, result):
    def compute():
        calls.append(name)
        return result

    return compute


class KeptExp(torch.autograd.Function):
    """exp(x), with x saved and the value kept."""

    @staticmethod
    def forward(ctx, x, calls):
        ctx.save_for_backward(x)
        return kept_result(counting(calls, "exp", x.exp())).detach()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.exp(), None


def block(x, calls):
    return KeptExp.apply(KeptExp.apply(x, calls).sin(), calls).sin()


def checkpointed(x, calls):
    return checkpoint(block, x, calls, use_reentrant=False, context_fn=keep_results)


def gradient(y, x):
    return torch.autograd.grad(y.sum(), x)[0]


def test_kept_results_are_computed_once_and_the_gradient_is_that_without_a_checkpoint():
    x, calls = torch.tensor([0.1, -0.7], requires_grad=True), []
    y = checkpointed(x, calls)
    assert len(calls) == 2
    found = gradient(y, x)
    assert len(calls) == 2
    assert torch.equal(found, gradient(block(x, []), x))


def test_each_of_several_open_blocks_has_its_own_results():
    x = torch.tensor([0.1, -0.7], requires_grad=True)
    inner, other = checkpointed(x, []), checkpointed(x + 1, [])
    found = gradient(checkpointed(inner, []) + other, x)
    assert torch.equal(found, gradient(block(block(x, []), []) + block(x + 1, []), x))


def test_without_a_checkpoint_every_call_computes():
    calls = []
    for number in range(2):
        assert kept_result(counting(calls, number, torch.tensor(number))).item() == number
    assert calls == [0, 1]
