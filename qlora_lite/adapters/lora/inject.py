"""Choose a model's linear layers by name and wrap them with LoRA weights.

Targets are ``"all-linear"`` (every linear layer inside the decoder blocks; never the head), plain names
such as ``"q_proj"`` (the last part of a module's path), or glob patterns over the whole path such as
``"model.layers.*.mlp.*"``. A pattern may carry its own rank and alpha; where several match, the last one
wins. A target that matches nothing is an error, since silence would train less than was asked for.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_lite.errors import ModelError
from qlora_lite.quant.linear import is_linear, routers

from .dora import DoraLinear
from .layer import LoraLinear
from .shared import share_inputs

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Target:
    """A name or glob pattern of layers to adapt, with its own rank and alpha where they differ."""

    pattern: str
    rank: int | None = None
    alpha: float | None = None


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer but the head and routers by path: the layers that LoRA may wrap."""
    head, left_out = model.get_output_embeddings(), routers(model)
    return {name: module for name, module in model.named_modules()
            if is_linear(module) and module is not head and name not in left_out}  # fmt: skip


def in_blocks(model: nn.Module) -> set[str]:
    """Return the paths of everything inside the blocks of a model, which transformers marks by their class.

    All of its paths, where nothing is marked.
    """
    blocks = {path: m for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if not blocks:
        return {path for path, _ in model.named_modules()}
    return {f"{path}.{name}" for path, block in blocks.items() for name, _ in block.named_modules()}


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern


def matching(names: Sequence[str], targets: Sequence[Target], inside: Container[str]) -> dict[str, tuple[int, ...]]:
    """Return which of the targets match each layer, by number; see ``choose_layers``."""

    def matches(pattern: str, name: str) -> bool:
        return name in inside if pattern == ALL_LINEAR else _matches(pattern, name)

    return {name: tuple(n for n, target in enumerate(targets) if matches(target.pattern, name)) for name in names}


def choose_layers(names: Sequence[str], targets: Sequence[Target], inside: Container[str]) -> dict[str, Target]:
    """Return the target of each chosen layer.

    Args:
        names: paths of the layers there are.
        inside: the paths that "all-linear" means.

    Raises:
        ModelError: targets that match no layer, all of them at once, each with the nearest names.
    """
    found = matching(names, targets, inside)
    used = {number for numbers in found.values() for number in numbers}
    if unmatched := [target.pattern for number, target in enumerate(targets) if number not in used]:
        known = sorted({name.rpartition(".")[2] for name in names})
        near = {near for pattern in unmatched for near in get_close_matches(pattern, known)}
        listed = ", ".join(repr(pattern) for pattern in unmatched)
        hint = f"did you mean {', '.join(sorted(near))}?" if near else f"this model has {', '.join(known)}"
        raise ModelError(f"lora.targets: {listed} matches no linear layer of this model; {hint}")
    return {name: targets[numbers[-1]] for name, numbers in found.items() if numbers}


def add_lora(
    model: nn.Module, targets: str | Sequence[str | Target] = ALL_LINEAR, rank: int = 16, alpha: float = 32.0,
    dropout: float = 0.0, rslora: bool = False, dtype: torch.dtype = torch.bfloat16, dora: bool = False,
) -> nn.Module:  # fmt: skip
    """Freeze the model and wrap the chosen linear layers in place; return the model.

    Args:
        targets: ``"all-linear"``, or names, glob patterns and ``Target`` objects.
        rank, alpha, dropout, rslora, dtype: see ``LoraLinear``.
        dora: learn the norms of the adapted weights' rows too; see ``dora``.

    Raises:
        ModelError: a target matches no layer, there are LoRA layers already, or an argument is invalid.
    """
    require_base(model)
    wanted = _as_targets(targets)
    _check_factors(rank, alpha, dropout, dtype)
    model.requires_grad_(False)
    layers, kind = linear_layers(model), DoraLinear if dora else LoraLinear
    for name, target in choose_layers(list(layers), wanted, in_blocks(model)).items():
        wrapped = kind(layers[name], target.rank or rank, target.alpha or alpha, dropout, rslora, dtype)
        wrapped.path = name
        wrapped.train(model.training)
        model.set_submodule(name, wrapped)
    share_inputs(model)
    return model


def require_model(model: object) -> nn.Module:
    """Check that a function was given a model of transformers, and return it.

    Raises:
        ModelError: it is something else, such as the path of one.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise ModelError(f"a model is wanted, not {type(model).__name__}; qlora_lite.load_model(PATH) loads one")
    return model


def require_base(model: object) -> None:
    """Check that a function was given a model without LoRA layers.

    Raises:
        ModelError: it has some, or is not a model.
    """
    if any(lora_layers(require_model(model))):
        raise ModelError("the model has LoRA layers already; load the base model again, or train those that it has")


def require_lora(model: nn.Module) -> None:
    """Check that a model has LoRA layers.

    Raises:
        ModelError: it has none, or is not a model.
    """
    require_model(model)
    if not any(lora_layers(model)):
        raise ModelError("the model has no LoRA layers; call add_lora first")


def _as_targets(targets: str | Sequence[str | Target]) -> list[Target]:
    listed = [targets] if isinstance(targets, str | Target) else targets
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(t, str | Target) for t in listed):
        raise ModelError(
            f"targets must be {ALL_LINEAR!r}, or a list of layers' names and glob patterns, not {targets!r}"
        )
    return [target if isinstance(target, Target) else Target(target) for target in listed]


def _check_factors(rank: object, alpha: object, dropout: object, dtype: object) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"rank is {rank!r}; give a whole number of at least 1")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise ModelError(f"alpha is {alpha!r}; give a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ModelError(f"dropout is {dropout!r}; give a number of at least 0 and below 1")
    # gradients of LoRA weights in float16 would be lost where the scale of the loss is taken out of them
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype == torch.float16:
        raise ModelError(f"dtype is {dtype!r}; give torch.bfloat16 or torch.float32")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the wrapped layers of a model with their paths."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable weights of a model with their paths, layer by layer: A, B, and of DoRA the magnitudes."""
    for name, layer in lora_layers(model):
        for leaf, parameter in layer.named_parameters(recurse=False):
            yield f"{name}.{leaf}", parameter
