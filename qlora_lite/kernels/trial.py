"""Try another way to compute something on a GPU: taken if it is faster and about as exact as this package's own.

No table says which kernel is the better one on a GPU, or whether it runs there at all. So each is tried on the run's
own shapes before the first step: forward and backward, its time, the memory that it takes beside its inputs, and its
errors against float64.
"""

import importlib
import importlib.util
import logging
import math
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch

from qlora_lite.errors import first_line

log = logging.getLogger(__name__)

Way = TypeVar("Way")

TIMED_RUNS = 3
FASTER = 0.95  # of our time: what is less apart may be chance
# Times our error, and what an error is counted as at least. Liger stores the gradient of the logits in bfloat16 after
# the target's share was subtracted: up to 2.5 times our error over Triton's interpreter (liger-kernel 0.8.5). What is
# wrong, and not only rounded otherwise, is off by far more.
WORSE, GRADIENT_ROUNDING, VALUE_ROUNDING = 3.0, 2.0**-9, 2.0**-12


class Trial(NamedTuple):
    """What a way took, forward and backward: seconds, bytes of the GPU beside its inputs, and relative errors."""

    seconds: float
    peak_bytes: int
    value_error: float
    gradient_error: float


def choose(
    setting: str,
    ours: tuple[str, Way],
    others: Mapping[str, Way],
    attempt: Callable[[Way], Trial],
    as_little_memory: bool = True,
) -> str | None:
    """Return the name of the way to take in place of ours, None to stay with it; say why.

    Args:
        setting: recipe key that allows it.
        ours: what it is called, and the way.
        others: by name.
        attempt: makes the trial of a way.
        as_little_memory: others may hold no more than ours, which is what a plan counts.
    """
    called, own = ours[0], attempt(ours[1])
    seconds, best = FASTER * own.seconds, None
    for name, way in others.items():
        try:
            trial = attempt(way)
        except foreign_errors() as error:
            log.info("%s: %s does not run here (%s: %s)", setting, name, type(error).__name__, first_line(error))
            continue
        fault = _fault(trial, own, as_little_memory)
        log.info(
            "%s: %s takes %.2f of the time of %s%s",
            setting,
            name,
            trial.seconds / own.seconds,
            called,
            f"; not used, {fault}" if fault else "",
        )
        if not fault and trial.seconds < seconds:
            seconds, best = trial.seconds, name
    log.info("%s: %s", setting, f"{best} is used" if best else f"{called} stays")
    return best


def _fault(trial: Trial, own: Trial, as_little_memory: bool) -> str:
    """Say why a way cannot stand for ours, whatever its time."""
    if as_little_memory and trial.peak_bytes > own.peak_bytes:
        return f"since it takes {trial.peak_bytes / 2**20:,.0f} MiB and not {own.peak_bytes / 2**20:,.0f}"
    for what, found, ours, least in (
        ("value", trial.value_error, own.value_error, VALUE_ROUNDING),
        ("gradient", trial.gradient_error, own.gradient_error, GRADIENT_ROUNDING),
    ):
        limit = WORSE * max(ours, least)
        if not found <= limit:  # NaN is not
            return f"since its {what} is off by {found:.1e}, at most {limit:.1e}"
    return ""


def foreign_errors() -> tuple[type[Exception], ...]:
    """Return what a package for other versions, a kernel that is not for this GPU, or a compiler may end with."""
    errors: tuple[type[Exception], ...] = (
        ImportError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        LookupError,
        AssertionError,
        OSError,
        subprocess.SubprocessError,
    )
    if importlib.util.find_spec("triton") is not None:
        errors += (importlib.import_module("triton.errors").TritonError,)
    return errors


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Return the least seconds of some runs after a first one, and the most bytes of the GPU that they took."""
    run()  # compiles, and chooses kernels
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = math.inf
    for _ in range(TIMED_RUNS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated(device) - held
