"""Choose the fastest plan that fits, and say what else would.

A plan varies what changes memory and time and not the result: how much is kept for backward, how many packs
of a step go through the model at once (their number per step stays), and the tokens whose logits exist at once.
Every candidate is simulated; none is guessed. (Evaluation is left out where it has no more tokens than training:
it then needs less than training's forward pass, which keeps tensors besides.) Among those that fit, the fastest
by the time model wins, and of plans that are as good as equally fast, the one that needs the least memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora_lite.errors import DoesNotFitError
from qlora_lite.ops.loss import AUTO_CHUNK_TOKENS
from qlora_lite.units import format_bytes

from .machine import Machine
from .predict import Prediction, predict
from .simulate import Job, Rows

EQUALLY_FAST = 1.03  # time estimates closer than this are not told apart
SMALL_CHUNK_TOKENS = 256
LENGTH_STEP = 64  # tokens; the longest sequence is found to this


@dataclass(frozen=True, slots=True)
class Step:
    """How an optimizer step is cut up: ``micro_batches`` times ``packs`` packs, each of the given rows.

    ``pack`` is the fullest pack; ``fixed_checkpointing`` and ``fixed_chunk`` are settings that the user chose
    and the search must keep, None leaves them to it; ``may_split`` allows another division of the same packs.
    """

    job: Job
    pack: Rows
    packs: int
    micro_batches: int
    fixed_checkpointing: str | None = None
    fixed_chunk: int | None = None
    may_split: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the step: settings, prediction, and estimated seconds of the whole optimizer step."""

    checkpointing: str
    loss_chunk_tokens: int
    packs: int
    micro_batches: int
    prediction: Prediction
    step_seconds: float

    @property
    def peak_bytes(self) -> int:
        """Most memory it needs, constants included."""
        return self.prediction.peak_bytes

    @property
    def settings(self) -> dict[str, object]:
        """The levers as recipe keys."""
        return {
            "memory.checkpointing": self.checkpointing, "memory.loss_chunk_tokens": self.loss_chunk_tokens,
            "train.micro_batch_size": self.packs, "train.gradient_accumulation_steps": self.micro_batches,
        }  # fmt: skip


def search(step: Step, machine: Machine, limit_bytes: int) -> list[Candidate]:
    """Simulate the divisions and policies that may be best; more packs at once as long as it fits and pays."""
    total = step.packs * step.micro_batches
    sizes = [n for n in range(1, total + 1) if total % n == 0] if step.may_split else [step.packs]
    sizes = [n for n in sizes if n == sizes[-1] or n & (n - 1) == 0]  # powers of two come near enough
    found: list[Candidate] = []
    for checkpointing in [step.fixed_checkpointing] if step.fixed_checkpointing else ["none", "block"]:
        earlier = None
        for packs in sizes:
            found.append(build_candidate(step, machine, checkpointing, packs, step.fixed_chunk or AUTO_CHUNK_TOKENS))
            too_large = found[-1].peak_bytes > limit_bytes
            if too_large or (earlier and found[-1].step_seconds * EQUALLY_FAST > earlier.step_seconds):
                break
            earlier = found[-1]
    if step.fixed_chunk is None and not any(candidate.peak_bytes <= limit_bytes for candidate in found):
        found.append(build_candidate(step, machine, found[-1].checkpointing, sizes[0], SMALL_CHUNK_TOKENS))
    return found


def build_candidate(step: Step, machine: Machine, checkpointing: str, packs: int, chunk: int) -> Candidate:
    """Simulate one way to run the step."""
    micro_batches = step.packs * step.micro_batches // packs
    rows = Rows(step.pack.lengths * packs, step.pack.learned * packs)
    evaluation = step.job.eval_rows
    if evaluation is not None and sum(evaluation.lengths) <= sum(rows.lengths):
        evaluation = None
    job = replace(
        step.job, rows=rows, eval_rows=evaluation, accumulating=micro_batches > 1, checkpointing=checkpointing,
        loss_chunk_tokens=chunk,
    )  # fmt: skip
    prediction = predict(job)
    return Candidate(
        checkpointing, chunk, packs, micro_batches, prediction,
        micro_batches * machine.seconds(prediction.simulation.work),
    )  # fmt: skip


def choose(found: list[Candidate], limit_bytes: int) -> Candidate | None:
    """Return the fastest candidate under a limit, None if none is; nearly equal ones go by memory."""
    fitting = [candidate for candidate in found if candidate.peak_bytes <= limit_bytes]
    if not fitting:
        return None
    fastest = min(candidate.step_seconds for candidate in fitting)
    return min(
        (candidate for candidate in fitting if candidate.step_seconds <= EQUALLY_FAST * fastest),
        key=lambda candidate: candidate.peak_bytes,
    )


def longest(job_of: Callable[[int], Job], limit_bytes: int, start: int, most: int) -> int:
    """Return the largest multiple of ``LENGTH_STEP`` whose job fits, by interpolation and then exactly.

    Args:
        job_of: builds the job for a number of tokens (or packs, with a step of one; see ``most_packs``).
        start: a first guess.
        most: the largest number to consider.

    Raises:
        DoesNotFitError: not even the smallest fits.
    """
    return _largest(lambda n: predict(job_of(n * LENGTH_STEP)).peak_bytes, limit_bytes,
                    max(1, start // LENGTH_STEP), max(1, most // LENGTH_STEP)) * LENGTH_STEP  # fmt: skip


def most_packs(job_of: Callable[[int], Job], limit_bytes: int, most: int) -> int:
    """Return the largest number of packs whose job fits.

    Raises:
        DoesNotFitError: not even one fits.
    """
    return _largest(lambda n: predict(job_of(n)).peak_bytes, limit_bytes, 1, most)


def _largest(peak_of: Callable[[int], int], limit_bytes: int, start: int, most: int) -> int:
    """Find the largest n from 1 to ``most`` with ``peak_of(n) <= limit``, for a peak that grows with n.

    The peak is nearly straight in n, so the next guess lies on the line through the two nearest points known.
    """
    known = {1: peak_of(1)}
    if known[1] > limit_bytes:
        raise DoesNotFitError(f"even the smallest needs {format_bytes(known[1])} of {format_bytes(limit_bytes)}")
    low, high = 1, most + 1  # low fits, high does not or may not be tried
    guess = min(max(start, 2), most)
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
