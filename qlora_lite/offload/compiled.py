"""Blocks under torch.compile, one graph for all blocks that are alike.

A block is traced once for each kind of layer and not for each row length: along the tokens its graph is dynamic, and
the lengths of the rows go in as a tensor. What a compiler should not look into are operators of their own: products
with packed weights (``quant.product``), so that no dequantised weight is ever its to keep, and attention over rows
(``kernels.attention``), whose loops follow the lengths.

The recomputation of a checkpointed block and its gradients are one graph too (``gradient_root``). Nothing has to live
from one to the other, and what only the block's value needs, such as its last product, is dead code.

Compiled functions round in other places than separate operators do, so results differ within rounding.

Source: regional compilation, https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qlora_lite.errors import ModelError

MAX_GRAPHS = 64  # of a process: kinds of blocks, by their layers, ranks, and whether they are kept; torch's limit is 8


def value(block: partial, *inputs: torch.Tensor) -> torch.Tensor:
    """Return ``block(*inputs)``, compiled.

    Args:
        block: as transformers gives it to a checkpointing function: a block's forward with its keywords.

    Raises:
        ModelError: it cannot be traced or compiled. A gradient may be compiled later: see ``in_words``.
    """
    with in_words():
        return _compiled(_value)(*_parts(block, inputs), *inputs)


def gradient_root(block: partial, grads: Sequence[torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return a scalar whose backward, for any gradient of its own, is that of ``block(*inputs)``.

    Args:
        block, inputs: see ``value``.
        grads: the gradient of each of the block's outputs.

    Raises:
        ModelError: it does not compile.
    """
    for grad in grads:
        _vary_along_tokens(grad)
    with in_words():
        return _compiled(_root)(tuple(grads), *_parts(block, inputs), *inputs)


def _value(forward: Callable, module: nn.Module, keywords: Mapping, *inputs):
    return forward(module, *inputs, **keywords)


def _root(grads: tuple, forward: Callable, module: nn.Module, keywords: Mapping, *inputs):
    outputs = forward(module, *inputs, **keywords)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return _Root.apply(*(tensor for pair in zip(outputs, grads, strict=True) for tensor in pair))


class _Root(torch.autograd.Function):
    """Take outputs, each followed by its gradient; be a scalar that hands the gradients on."""

    @staticmethod
    def forward(ctx, *pairs):
        ctx.save_for_backward(*pairs[1::2])
        return pairs[0].new_zeros(())

    @staticmethod
    def backward(ctx, _grad_root):
        return tuple(part for grad in ctx.saved_tensors for part in (grad, None))


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)  # a break in the graph is an error


def _parts(block: partial, inputs: tuple) -> tuple[Callable, nn.Module, dict]:
    """Return the forward, the module and the keywords of a call, which guards can tell from those of other kinds."""
    keywords = dict(block.keywords)
    if "row_lengths" in keywords:
        keywords["row_lengths"] = lengths_tensor(keywords["row_lengths"])
    for tensor in tree_leaves((inputs, keywords)):
        _vary_along_tokens(tensor)
    if isinstance(block.func, MethodType):  # until transformers 5.19: the module's call, and no wrapped forward
        module = block.func.__self__
        return type(module).forward, module, keywords
    return block.func, block.args[0], keywords


def lengths_tensor(row_lengths: Sequence[int]) -> torch.Tensor:
    """Return the lengths of any number of rows, with a zero behind: a graph is never dynamic where there is one."""
    tensor = torch.tensor((*row_lengths, 0))
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _vary_along_tokens(tensor: object) -> None:
    """Let a graph serve other numbers of tokens; tensors are [1, T, ...]."""
    if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[1] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, 1)


@contextmanager
def in_words() -> Iterator[None]:
    """Raise a ModelError that says what to do where torch cannot compile what is inside, forward or backward.

    Where a compiler has no memory left, that error is raised, which is another one's to deal with.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        if isinstance(inner := getattr(error, "inner_exception", None), torch.OutOfMemoryError | MemoryError):
            raise inner from error
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ModelError(f"train.compile: the blocks cannot be compiled ({reason}); set it to false") from error


@contextmanager
def as_outside() -> Iterator[None]:
    """Run what an operator of our own does as outside of it.

    torch hides it from autograd, whether gradients are enabled or not, and below a dispatch mode from all that its
    compiler and ``vmap`` are made of. Autocast alone is hidden outside too.
    """
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    hidden = keys(key.AutocastCPU) | keys(key.AutocastCUDA)
    # as torch's own leaf functions do (torch 2.13, _higher_order_ops/invoke_leaf_function.py)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden):
        yield
