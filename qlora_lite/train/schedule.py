"""Learning-rate factors as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from fractions import Fraction


def lr_factor(step: int, total_steps: int, schedule: str, warmup_ratio: float) -> float:
    """Return the factor on the peak learning rate for one step.

    Args:
        step: optimizer step, counted from 1 to ``total_steps``.
        schedule: ``constant``, ``linear`` or ``cosine`` (both reach 0 after the last step).
        warmup_ratio: share of the steps, rounded up, that rise linearly to the peak.
    """
    warmup = math.ceil(total_steps * Fraction(warmup_ratio).limit_denominator(1_000_000))
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
