"""Adapters of other methods than LoRA as read from their folders: each is its method, and the tensors of its file.

LoRA's folders have a reader of their own (``read``). Of another method, the configuration says its settings, and
``AdapterMethod.shapes`` which tensors there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from qlora_lite.errors import ModelError
from qlora_lite.registry import find, names

from .method import AdapterMethod

LISTED = 50  # problems of one file shown


@runtime_checkable
class SavedMethod(Protocol):
    """A method that is registered, as far as reading adapters asks for it.

    Args:
        peft_types: of ``adapter_config.json``, by which its adapters are known; none of LoRA, which has a reader of
            its own, and of methods that leave no adapter.
    """

    peft_types: tuple[str, ...]

    def read(self, config: Mapping) -> AdapterMethod:
        """Return the method that a configuration describes.

        Raises:
            ModelError: a setting is invalid.
        """


def find_saved(peft_type: object) -> SavedMethod | None:
    """Return the method whose adapters have a peft_type; None where there is none."""
    entries = (find("methods", name, SavedMethod) for name in names("methods"))
    return next((entry for entry in entries if peft_type in entry.peft_types), None)


@dataclass(frozen=True, slots=True)
class Saved:
    """An adapter of another method than LoRA, checked against a model; tensors by their names in files."""

    method: AdapterMethod
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Return what it takes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def attach(self, model: nn.Module) -> nn.Module:
        """Add the adapter to a base model, on the device that it computes on, and fill it; return the model."""
        self.method.apply(model)
        where: torch.device = model.device
        device = torch.device("cpu") if where.type == "meta" else where
        for module in model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad and parameter.device != device:  # the layer's weight is elsewhere
                    setattr(module, leaf, nn.Parameter(torch.empty_like(parameter, device=device)))
        self.method.fill(model, self.tensors)
        return model


def read_method(entry: SavedMethod, config: Mapping, path: Path) -> AdapterMethod:
    """Return the method that a configuration describes.

    Raises:
        ModelError: a setting is invalid.
    """
    try:
        return entry.read(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def checked(model: nn.Module, folder: Path, method: AdapterMethod, tensors: dict[str, torch.Tensor]) -> Saved:
    """Return an adapter, if its tensors are those of a model.

    Args:
        model: a base model; shapes are enough.
        tensors: of its file.

    Raises:
        ModelError: naming all that are missing, unexpected, of a wrong shape or not finite.
    """
    expected = method.shapes(model)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [
        f"{name[:200]} belongs to no layer that is adapted" for name in sorted(tensors.keys() - expected.keys())
    ]
    for name, shape in expected.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and not of numbers {shape}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} is not finite")
    if problems:
        shown = "; ".join(problems[:LISTED] + ([f"and {len(problems) - LISTED} more"] if problems[LISTED:] else []))
        raise ModelError(f"the adapter {folder} does not fit this model: {shown}")
    return Saved(method, tensors)
