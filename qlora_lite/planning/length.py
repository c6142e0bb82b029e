"""The longest sequence that fits, when every memory option that is left to the planner saves most.

Where the host's memory is no limit, that is one way to run the step. Where it is, a way that keeps less there may have
room for more: checkpoints or weights on the device, or as many blocks as the host has no room for.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from qlora_lite.errors import DoesNotFitError
from qlora_lite.models.memory_options import MemoryOptions

from .candidate import Step, predicted
from .largest import LENGTH_STEP, longest
from .search import FEWEST_ALIKE, first_options, in_segments, smaller, with_disk, with_less_on_host
from .simulate import Job

JobOf = Callable[[int], Job]  # builds the job for a number of tokens


def longest_job(step: Step, limit_bytes: int, host_limit_bytes: int | None, start: int, largest: int) -> Job:
    """Return the job with the most tokens of a pack, a multiple of ``LENGTH_STEP``: of one row, or of several
    where the step's have several.

    Args:
        limit_bytes: what a plan may use of the device.
        host_limit_bytes: what it may use of the host's memory beside a GPU, None where that is not known.
        start: a first guess.
        largest: the largest number to consider.

    Raises:
        DoesNotFitError: not even the shortest fits.
    """
    largest = min(largest, step.job.workload.spec.most_tokens or largest)
    prediction_of = partial(predicted, step)
    ways = _ways(with_disk(step), host_limit_bytes)
    saving_most, guess = next(ways), start
    reason: DoesNotFitError | None = None
    try:
        guess = longest(saving_most, limit_bytes, None, start, largest, prediction_of)
        job = saving_most(guess)
        inputs_on_device = job.options.recomputes and not job.options.offload_checkpoints
        if prediction_of(job).fits_host(host_limit_bytes) and not inputs_on_device:
            return job
    except DoesNotFitError as error:  # of one or two blocks, streaming needs more than it spares
        reason = error
    found, found_by = 0, saving_most
    for job_of in (*ways, saving_most):
        more = found + LENGTH_STEP
        if found and (more > largest or not prediction_of(job_of(more)).fits(limit_bytes, host_limit_bytes)):
            continue
        try:
            found = longest(job_of, limit_bytes, host_limit_bytes, found or guess, largest, prediction_of)
            found_by = job_of
        except DoesNotFitError as error:
            reason = reason or error
    if found:
        return found_by(found)
    assert reason is not None  # the last way found none
    raise reason


def _ways(step: Step, host_limit_bytes: int | None) -> Iterator[JobOf]:
    """Yield ways to run a step: first the one that needs least of the device, then those with less in host memory."""
    for each in with_less_on_host(step):
        for number, options in enumerate(reversed([first_options(each), *smaller(each)])):
            yield partial(_one_pack, each, options)
            streams_all = number == 0 and options.resident_layers == 0 and "resident_layers" not in each.fixed
            if streams_all and host_limit_bytes is not None and options.stream_from == "host":
                yield _partly_streamed(each, options, host_limit_bytes)
            if number == 0:
                for segments in in_segments(each, options):
                    yield partial(_one_pack, each, segments)


def packs_at_once(step: Step) -> int:
    """Return the fewest packs that may go through at once."""
    return 1 if step.may_split else step.packs


def _one_pack(step: Step, options: MemoryOptions, tokens: int) -> Job:
    """Return the step's job for packs of so many tokens, as few at once as may be."""
    packs = packs_at_once(step)
    accumulating = step.packs * step.micro_batches // packs > 1
    full_pack, its_evaluation = step.job.workload.batches.full_pack, step.job.eval_shape
    evaluation = full_pack(tokens, len(its_evaluation.lengths) > 1) if its_evaluation else None
    shape = full_pack(tokens, len(step.pack.lengths) > 1).times(packs)
    return replace(step.job, shape=shape, eval_shape=evaluation, accumulating=accumulating, options=options)


def _partly_streamed(step: Step, options: MemoryOptions, host_limit_bytes: int) -> JobOf:
    """Return a way in which those blocks stay on the device that the host has no room for."""
    fewest, most = FEWEST_ALIKE, step.job.workload.spec.depth - FEWEST_ALIKE

    def host_bytes(tokens: int, resident: int) -> int:
        return predicted(step, _one_pack(step, replace(options, resident_layers=resident), tokens)).host_bytes

    block_bytes = (host_bytes(LENGTH_STEP, 0) - host_bytes(LENGTH_STEP, fewest)) // fewest

    def job_of(tokens: int) -> Job:
        missing = host_bytes(tokens, 0) - host_limit_bytes
        count = max(fewest, -(-missing // block_bytes))
        while count < most and host_bytes(tokens, count) > host_limit_bytes:  # several share an allocation
            count += 1
        return _one_pack(step, replace(options, resident_layers=count if count <= most else None), tokens)

    return job_of
