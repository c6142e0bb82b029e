"""Gradients of an optimizer's parameters: their norms, what clips them, and whether they are finite."""

import math
from collections.abc import Iterable, Sequence

import torch

from qlora_lite.memory.marks import category


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return an optimizer's parameters, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def fill_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give parameters that nothing has read a gradient of zero, such as those that a model has for another task."""
    with category("gradients"):
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def gradient_norms(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Return the L2 norm of each parameter's gradient, float32 [n], accumulated in float32 whatever their type.

    No value is read back to the host.
    """
    return torch.stack(torch._foreach_norm([p.grad for p in parameters], 2, dtype=torch.float32))


def are_finite(numbers: torch.Tensor | None) -> bool:
    """Return whether numbers are finite, which the host waits for; those of a plan, and none, are."""
    return numbers is None or numbers.is_meta or all(map(math.isfinite, numbers.tolist()))


def clip_scale(norm: torch.Tensor, max_norm: float) -> torch.Tensor | None:
    """Return what scales gradients of a total L2 norm to ``max_norm`` at most, as ``clip_grad_norm_`` does; None for 0.

    An optimizer's step applies it to the gradients that it copies together: in place, torch would scale bfloat16
    gradients by a float32 number one after the other on a GPU, and round them once more.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else None
