"""The factor on the loss of a model that computes in float16, so that small gradients are not lost on their way back.

float16 has nothing between 0 and 6e-8, and nothing above 65,504. A backward pass that begins with a power of two in
place of 1 gives every gradient times that power, and dividing by it afterwards changes no bit but those of the
exponent. The factor is as large as gradients allow: it is halved where one overflows, and doubled after many steps in
which none did. A step that overflowed is recomputed with the smaller factor, so that no example is left out and
steps are counted as they are without it. (To leave the step out is the known other way: ``torch.amp.GradScaler``, whose
numbers these are.)

Source: mixed precision training, arXiv 1710.03740, section 3.2.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

GROWTH_STEPS = 2000  # without an overflow, after which the scale is doubled


class _Result(Protocol):
    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...


R = TypeVar("R", bound=_Result)


@dataclass(slots=True)
class LossScale:
    """The scale of the next step, and how many steps in a row had no overflow since it last changed."""

    value: float = 2.0**16
    good_steps: int = 0

    def step(self, attempt: Callable[[float], R]) -> R:
        """Return a step at the largest scale, from the present one down to 1, at which its gradients are finite.

        A scale helps nothing where the loss is not finite, or gradients overflow at 1 too: that result is returned as
        it is, and the scale stays what it was.

        Args:
            attempt: runs the step at a scale; it leaves the weights alone where ``grad_norm`` is not finite.
        """
        scale = self.value
        result = attempt(scale)
        while scale > 1 and math.isfinite(result.loss) and not math.isfinite(result.grad_norm):
            scale /= 2
            result = attempt(scale)
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self.good_steps = self.good_steps + 1 if scale == self.value else 0
            self.value = scale
            if self.good_steps == GROWTH_STEPS:
                self.value, self.good_steps = 2 * scale, 0
        return result


def unscale(parameters: Iterable[torch.nn.Parameter], scale: float) -> None:
    """Divide gradients by the scale that their backward pass began with."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1 and gradients:
        torch._foreach_mul_(gradients, 1 / scale)
