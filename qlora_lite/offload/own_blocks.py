"""Models that run their blocks by a call of their own, and not by transformers' ``GradientCheckpointingLayer``.

Checkpointing stands between a model and its blocks. In transformers each block brings the place for it. diffusers'
models have one place for all: a function that is called with a block and its inputs. So a model of that kind is held by
a module of ours that says which its blocks are and hands on what runs each (a wrapper around every block would change
the names of all weights).
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from qlora_lite.errors import ModelError


class OwnBlocks(nn.Module):
    """A model that says itself which its blocks are."""

    def block_paths(self) -> list[str]:
        """Return the paths of the blocks, in the order in which they run."""
        raise NotImplementedError

    def idle_layers(self) -> list[str]:
        """Return the paths of layers whose output nothing uses, so that they cannot learn."""
        return []

    def run_blocks(self, calls: Mapping[nn.Module, Callable]) -> None:
        """Have blocks run by ``calls[block](block, *inputs)`` wherever gradients are recorded, all others as they are.

        Args:
            calls: by block; empty puts everything back.
        """
        raise NotImplementedError


class BlockCalls:
    """Run each block by what is there for it: ``BlockCalls(calls)(block, *inputs)``."""

    def __init__(self, calls: Mapping[nn.Module, Callable]):
        self._calls = dict(calls)

    def __call__(self, block: nn.Module, *inputs):
        call = self._calls.get(block)
        if call is None:
            return block(*inputs)
        if any(
            isinstance(value, torch.Tensor) and value.requires_grad
            for group in inputs
            if isinstance(group, tuple | list)
            for value in group
        ):
            raise ModelError(
                f"a {type(block).__name__} is given a group of tensors that are learned, whose gradient "
                "would be lost where blocks are recomputed: set memory.checkpointing to none, or adapt "
                "layers inside of blocks only"
            )
        return call(block, *inputs)
