"""The largest of a number of tokens, packs or blocks whose plan still fits, found with few simulations."""

from collections.abc import Callable

from qlora_lite.errors import DoesNotFitError
from qlora_lite.units import format_bytes

from .predict import Prediction, predict
from .simulate import Job

LENGTH_STEP = 64  # tokens; the longest sequence is found to this


def most(peak_of: Callable[[int], int], limit_bytes: int, largest: int) -> int:
    """Return the largest count from 0 to ``largest`` whose peak fits; 0 is known to."""
    low, high = 0, largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_of(middle) <= limit_bytes else (low, middle)
    return low


def longest(
    job_of: Callable[[int], Job], limit_bytes: int, host_limit_bytes: int | None, start: int, largest: int
) -> int:  # fmt: skip
    """Return the largest multiple of ``LENGTH_STEP`` whose job fits, by interpolation and then exactly.

    Args:
        job_of: builds the job for a number of tokens.
        host_limit_bytes: what may be used of the host's memory beside a card, None where that is not known.
        start: a first guess.
        largest: the largest number to consider.

    Raises:
        DoesNotFitError: not even the smallest fits.
    """
    return LENGTH_STEP * _most_that_fit(
        lambda n: predict(job_of(n * LENGTH_STEP)), limit_bytes, host_limit_bytes,
        max(1, start // LENGTH_STEP), max(1, largest // LENGTH_STEP),
    )  # fmt: skip


def most_packs(job_of: Callable[[int], Job], limit_bytes: int, host_limit_bytes: int | None, largest: int) -> int:
    """Return the largest number of packs whose job fits.

    Raises:
        DoesNotFitError: not even one fits.
    """
    return _most_that_fit(lambda n: predict(job_of(n)), limit_bytes, host_limit_bytes, 1, largest)


def _most_that_fit(
    prediction_of: Callable[[int], Prediction], limit_bytes: int, host_limit_bytes: int | None, start: int, largest: int
) -> int:  # fmt: skip
    found = largest_of(lambda n: prediction_of(n).peak_bytes, limit_bytes, start, largest)
    if host_limit_bytes is None or prediction_of(found).fits_host(host_limit_bytes):
        return found
    found = most(lambda n: prediction_of(n).host_bytes, host_limit_bytes, found)
    if not found:
        needed = format_bytes(prediction_of(1).host_bytes)
        raise DoesNotFitError(f"even the smallest needs {needed} of {format_bytes(host_limit_bytes)} host memory")
    return found


def largest_of(peak_of: Callable[[int], int], limit_bytes: int, start: int, largest: int) -> int:
    """Find the largest n from 1 to ``largest`` with ``peak_of(n) <= limit``, for a peak that grows with n.

    The peak is nearly straight in n, so the next guess lies on the line through the two nearest points known.
    """
    known = {1: peak_of(1)}
    if known[1] > limit_bytes:
        raise DoesNotFitError(f"even the smallest needs {format_bytes(known[1])} of {format_bytes(limit_bytes)}")
    low, high = 1, largest + 1  # low fits, high does not or may not be tried
    guess = min(max(start, 2), largest)
    while high - low > 1:
        known[guess] = peak_of(guess)
        low, high = (guess, high) if known[guess] <= limit_bytes else (low, guess)
        below = max(n for n in known if n <= low)
        above = min((n for n in known if n > below), default=None)
        if above is None:  # everything fits so far: follow the line through the last two
            above, below = below, max(n for n in known if n < below)
        slope = max(1.0, (known[above] - known[below]) / (above - below))
        guess = min(max(int(below + (limit_bytes - known[below]) / slope), low + 1), high - 1)
    return low
