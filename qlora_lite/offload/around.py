"""A module that stands in another one's place and changes how it is run, not what it is called."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn


class Around(nn.Module):
    """Hold a module whose parameters, buffers and children stay registered under the names they had.

    Registering the module itself would put a part into every name below it, which adapters, checkpoints and
    ``get_submodule`` would all have to take out again.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self._inner = (inner,)  # a tuple hides it from registration
        self._parameters, self._buffers, self._modules = inner._parameters, inner._buffers, inner._modules
        self.training = inner.training

    @property
    def inner(self) -> nn.Module:
        """The module that was here."""
        return self._inner[0]

    def train(self, mode: bool = True) -> "Around":
        """Set the mode of both."""
        self.inner.train(mode)
        return super().train(mode)


Kind = TypeVar("Kind", bound=Around)


def wrap_parts(model: nn.Module, wrap: Callable[[nn.Module], Around | None]) -> None:
    """Replace each part of a model by what ``wrap`` returns for it; None leaves the part."""
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if (new := wrap(part)) is not None:
                setattr(module, name, new)


def wrappers(model: nn.Module, kind: type[Kind]) -> Iterator[Kind]:
    """Yield the modules of a kind in a model, those inside other ``Around`` modules too."""
    for module in model.modules():
        while isinstance(module, Around):
            if isinstance(module, kind):
                yield module
            module = module.inner
