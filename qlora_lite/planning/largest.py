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
    job_of: Callable[[int], Job],
    limit_bytes: int,
    host_limit_bytes: int | None,
    start: int,
    largest: int,
    prediction_of: Callable[[Job], Prediction] = predict,
) -> int:
    """Return the largest multiple of ``LENGTH_STEP`` whose job fits, by interpolation and then exactly.

    Args:
        job_of: builds the job for a number of tokens.
        host_limit_bytes: what may be used of the host's memory beside a GPU, None where that is not known.
        start: a first guess.
        largest: the largest number to consider.
        prediction_of: predicts a job, as ``predict`` does.

    Raises:
        DoesNotFitError: not even the smallest fits.
    """
    return LENGTH_STEP * _most_that_fit(
        lambda n: prediction_of(job_of(n * LENGTH_STEP)),
        limit_bytes,
        host_limit_bytes,
        max(1, start // LENGTH_STEP),
        max(1, largest // LENGTH_STEP),
    )


def most_packs(
    job_of: Callable[[int], Job],
    limit_bytes: int,
    host_limit_bytes: int | None,
    largest: int,
    prediction_of: Callable[[Job], Prediction] = predict,
) -> int:
    """Return the largest number of packs whose job fits.

    Raises:
        DoesNotFitError: not even one fits.
    """
    return _most_that_fit(lambda n: prediction_of(job_of(n)), limit_bytes, host_limit_bytes, 1, largest)


def _most_that_fit(
    prediction_of: Callable[[int], Prediction], limit_bytes: int, host_limit_bytes: int | None, start: int, largest: int
) -> int:
    smallest = prediction_of(1)
    if not smallest.fits(limit_bytes, host_limit_bytes):
        needed, limit, where = smallest.peak_bytes, limit_bytes, ""
        if smallest.peak_bytes <= limit_bytes and host_limit_bytes is not None:
            needed, limit, where = smallest.host_bytes, host_limit_bytes, " host memory"
        raise DoesNotFitError(f"even the smallest needs {format_bytes(needed)} of {format_bytes(limit)}{where}")
    missing = smallest.missing_bytes(limit_bytes, host_limit_bytes)
    return largest_of(lambda n: prediction_of(n).missing_bytes(limit_bytes, host_limit_bytes), missing, start, largest)


def largest_of(missing_of: Callable[[int], float], missing_of_one: float, start: int, largest: int) -> int:
    """Find the largest n from 1 to ``largest`` with ``missing_of(n) <= 0``, of what grows with n; n = 1 is known to do.

    It is nearly straight in n, so the next guess lies on the line through the two nearest points known. Where that
    comes near from one side alone, since the other point is far away on a curve, the guess goes beyond the line by as
    much as the line is from the last one, so that both points come near. Memory that is taken in large steps shows in
    guesses that get on slowly all the same: what is open is then halved. As long as everything fits, guesses go a
    little beyond the line, and from the third on steps double.
    """
    known = {1: missing_of_one}
    low, high, slow, ups = 1, largest + 1, 0, 0  # low fits, high does not or may not be tried
    guess = min(max(start, 2), largest)
    while high - low > 1:
        known[guess], before, below, was_between, last = missing_of(guess), high - low, low, high in known, guess
        low, high = (guess, high) if known[guess] <= 0 else (low, guess)
        if high in known:
            is_slow = was_between and 2 * (high - low) > before
            slow += is_slow
            slope = (known[high] - known[low]) / (high - low)
            guess = low - int(known[low] / slope)
            if slow > 2:
                guess = (low + high) // 2
            elif is_slow:
                guess += max(1, guess - last) if last == low else min(-1, guess - last)
        else:
            slope = max(1.0, (known[low] - known[below]) / (low - below))
            ahead, ups = low - int(known[low] / slope), ups + 1
            guess = ahead + (ahead - low) // 16 if ups <= 2 else max(ahead, 3 * low - 2 * below)
        guess = min(max(guess, low + 1), high - 1)
    return low
