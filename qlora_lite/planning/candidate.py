"""Ways to run a step, each simulated, and the best of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.quant.merging import OFF
from qlora_lite.train.batches import BatchShape

from .machine import HOST_UPDATES_PER_SECOND, Machine
from .predict import Prediction, predict
from .simulate import Job

Changes = dict[str, Any]  # fields of MemoryOptions, and what they become

NOT_CHOSEN = {
    "optimizer_in_backward",
    "compile",
    "offload_folder",
    "kernels",
}  # memory options that are as the recipe says
EQUALLY_FAST = 1.03  # time estimates closer than this are not told apart


@dataclass(frozen=True, slots=True)
class Step:
    """How an optimizer step is cut up: ``micro_batches`` times ``packs`` packs, each of the given shape.

    ``pack`` is the fullest pack; ``fixed`` are the memory options that the user chose, or the workload has no choice
    of, and the search must keep;
    ``may_split`` allows another division of the same packs. ``known`` is what was predicted of jobs.
    """

    job: Job
    pack: BatchShape
    packs: int
    micro_batches: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    may_split: bool = True
    known: dict[Job, Prediction] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        work = self.job.workload
        tiles = {} if work.spec.has_tokenwise_parts else {"tile_tokens": None}
        unmerged = {"cache_merged": False} if work.method.merge_aware == OFF else {}
        object.__setattr__(self, "fixed", {**tiles, **self.fixed, **work.spec.fixed_options(work.method), **unmerged})

    def sizes(self) -> list[int]:
        """Return the numbers of packs that may go through at once, smallest first."""
        total = self.packs * self.micro_batches
        sizes = [n for n in range(1, total + 1) if total % n == 0] if self.may_split else [self.packs]
        return [n for n in sizes if n == sizes[-1] or n & (n - 1) == 0]  # powers of two come near enough


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the step: memory options, prediction, and estimated seconds of the whole optimizer step.

    ``host_limit_bytes`` is the machine's ``host_bytes``.
    """

    options: MemoryOptions
    packs: int
    micro_batches: int
    prediction: Prediction
    step_seconds: float
    host_limit_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """Most memory it needs, constants included."""
        return self.prediction.peak_bytes

    @property
    def fits_host(self) -> bool:
        """Whether the host beside a GPU has room for what it keeps there, as far as that is known."""
        return self.prediction.fits_host(self.host_limit_bytes)

    def fits(self, limit_bytes: float) -> bool:
        """Return whether the device and the host have room for it."""
        return self.prediction.fits(limit_bytes, self.host_limit_bytes)

    @property
    def settings(self) -> dict[str, object]:
        """What the plan chose, by recipe keys."""
        no_choice = NOT_CHOSEN | ({"cache_merged"} if self.prediction.job.workload.method.merge_aware == OFF else set())
        options = {
            f"memory.{key}": value
            for key, value in self.options.settings.items()
            if key not in no_choice and value is not None
        }
        return options | {
            "train.micro_batch_size": self.packs,
            "train.gradient_accumulation_steps": self.micro_batches,
        }


def settled(step: Step, options: MemoryOptions) -> MemoryOptions:
    """Return the memory options with what is streamed from where the step's is to be, if anything is."""
    source = step.fixed.get("stream_from", options.stream_from)
    return replace(options, stream_from="host" if options.resident_layers is None else source)


def build_candidate(step: Step, machine: Machine, options: MemoryOptions, packs: int) -> Candidate:
    """Simulate one way to run the step, if that was not done before."""
    micro_batches = step.packs * step.micro_batches // packs
    shape, evaluation = step.pack.times(packs), step.job.eval_shape
    counts = step.job.workload.batches.has_large_inputs  # a probe has both
    if evaluation is not None and evaluation.tokens <= shape.tokens and not counts:
        evaluation = None
    options = settled(step, options)
    job = replace(step.job, shape=shape, eval_shape=evaluation, accumulating=micro_batches > 1, options=options)
    return timed(machine, options, packs, micro_batches, predicted(step, job))


def predicted(step: Step, job: Job) -> Prediction:
    """Predict a job of the step, if that was not done before."""
    if job not in step.known:
        step.known[job] = predict(job)
    return step.known[job]


def timed(
    machine: Machine, options: MemoryOptions, packs: int, micro_batches: int, prediction: Prediction
) -> Candidate:
    """Return a way to run the step whose memory is known."""
    seconds = machine.seconds(prediction.simulation.work, micro_batches)
    seconds = max(seconds, prediction.host_updates / HOST_UPDATES_PER_SECOND)  # beside what the GPU computes
    return Candidate(options, packs, micro_batches, prediction, seconds, machine.host_bytes)


def choose(found: Sequence[Candidate], limit_bytes: int) -> Candidate | None:
    """Return the fastest candidate under a limit, None if none is.

    Of nearly equal ones, the one that leaves more where it is, then the one that needs the least memory, and then the
    fastest.
    """
    fitting = [candidate for candidate in found if candidate.fits(limit_bytes)]
    if not fitting:
        return None
    fastest = min(candidate.step_seconds for candidate in fitting)
    return min(
        (candidate for candidate in fitting if candidate.step_seconds <= EQUALLY_FAST * fastest),
        key=lambda candidate: (candidate.options.host_rank, candidate.peak_bytes, candidate.step_seconds),
    )
