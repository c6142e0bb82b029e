"""Plan a recipe: what it will need, whether that fits, which settings are fastest, and what else would fit.

The composition of ``planning`` with recipes, for the ``plan`` command (before anything is downloaded; every
micro-batch taken as full) and for ``run`` (with the rows that were really read).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

from qlora_lite.errors import DoesNotFitError, ModelError, RecipeError
from qlora_lite.files import Space
from qlora_lite.memory.bar import BESIDE, TRAINED
from qlora_lite.memory.gpus import GpuError
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.candidate import Candidate, Step, build_candidate, choose, predicted, timed
from qlora_lite.planning.largest import most, most_packs
from qlora_lite.planning.length import longest_job, packs_at_once
from qlora_lite.planning.machine import Machine
from qlora_lite.planning.predict import Prediction, predict
from qlora_lite.planning.search import SMALL_CHUNK_TOKENS, first_options, search, single_changes, smaller
from qlora_lite.planning.simulate import Job
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.model_spec import TransformerSpec
from qlora_lite.units import format_bytes

from .job import build_job
from .settings import fixed_options, learning_rate
from .task import find_task, packs, sequence_tokens

log = logging.getLogger(__name__)

MAX_TOKENS, MAX_PACKS = 2**21, 256  # the ends of --max-tokens and --max-batch
MAX_RESOLUTION, RESOLUTION_STEP = 2**13, 64  # of --max-resolution, in pixels
MAX_CHANGES = 2  # settings in which an alternative that is shown may differ from the chosen plan


@dataclass(frozen=True, slots=True)
class Alternative:
    """One change to the chosen plan, and what it would need."""

    change: str
    peak_bytes: int
    step_seconds: float
    fits: bool
    fits_host: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen way to run a recipe's step, why, and the other ways.

    ``chosen`` fits unless ``fits`` is False; then it is the one that needs the least. ``of_ranks`` are the settings of
    each rank, by recipe keys, of several that do not all have the same.
    """

    recipe: Recipe
    machine: Machine
    budget_bytes: int
    chosen: Candidate
    fits: bool
    found: tuple[Candidate, ...]
    step: Step
    kept_checkpoints: int
    learning_rate: float
    of_ranks: tuple[dict, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Peak of the device's memory (of the whole process on a CPU)."""
        return self.machine.base_bytes + self.chosen.peak_bytes

    @property
    def limit_bytes(self) -> int:
        """What the budget leaves to a candidate."""
        return self.budget_bytes - self.machine.base_bytes

    @property
    def breakdown(self) -> dict[str, int]:
        """Bytes of the device at the peak by category, and what is beside the tensors."""
        tensors = self.chosen.prediction.simulation.peak().on_device
        return tensors | {BESIDE: self.peak_bytes - sum(tensors.values())}


def plan_recipe(
    recipe: Recipe,
    machine: Machine,
    budget_bytes: int,
    shape: BatchShape | None = None,
    eval_shape: BatchShape | None = None,
) -> Plan:
    """Choose the fastest way to run a recipe's step within a budget.

    Args:
        machine: where it is to run.
        budget_bytes: most memory it may use, the process's own included.
        shape: of a pack that needs as much as any; None takes ``data.max_tokens`` tokens, all learned.
        eval_shape: of an evaluation pack; None likewise, if the recipe has evaluation rows.

    Raises:
        ModelError: the model's configuration is not known here, or cannot be planned.
        RecipeError: it is no recipe, or more blocks are to be kept or resident than the model has.
        GpuError: the machine is not a ``Machine``, or the budget not a number of bytes.
    """
    require_recipe(recipe)
    if not isinstance(machine, Machine):
        raise GpuError(f"a machine is wanted, not {type(machine).__name__}; qlora_lite.machine_of_gpu(GPU) makes one")
    if not isinstance(budget_bytes, int | float):
        raise GpuError(f"budget_bytes is {budget_bytes!r}; give a number, such as 8 * 2**30")
    t, m = recipe.train, recipe.memory
    d = recipe.data
    job = build_job(recipe, machine, eval_shape)
    together, tokens = not job.workload.spec.runs_row_by_row(d.max_tokens), sequence_tokens(recipe)
    if d.has_eval and eval_shape is None:
        job = replace(job, eval_shape=job.workload.batches.full_pack(tokens, packing=together), saved_adapters=2)
    machine, fixed = machine.computing_in(job.workload.spec.compute_dtype), fixed_options(recipe)
    for one, other in permutations(("host_embeddings", "host_head")):
        if job.workload.spec.tables_are_tied and one in fixed:
            fixed.setdefault(other, fixed[one])
    trains_base = job.workload.method.trains_base
    can_divide = machine.shards.count > 1
    if trains_base and (m.stream_from not in ("auto", "ranks") or job.workload.method.in_turn):
        can_divide = False
    if trains_base and can_divide:
        fixed["stream_from"] = "ranks"  # see ``constraints.DIVIDED_ON_GPUS``
        if m.optimizer_in_backward:  # whose gradients of whole weights would all have to be added up at the end
            fixed["resident_layers"] = 0
    elif trains_base and not m.optimizer_in_backward:
        fixed["resident_layers"] = None  # see ``constraints.STREAMED_TRAINED``
    if can_divide:
        fixed["shards"] = machine.shards
    elif fixed.get("stream_from") == "ranks":
        raise RecipeError(
            "memory.stream_from ranks divides the weights of layers among several processes, and this is "
            "one: start more (qlora-lite train --gpus), or set it to auto"
        )
    pack = shape or job.workload.batches.full_pack(tokens, packs(recipe) and together)
    step = Step(
        job,
        pack,
        t.micro_batch_size,
        t.gradient_accumulation_steps,
        fixed,
        m.micro_batches == "auto" and not m.optimizer_in_backward,
    )
    _check_counts(fixed, job.workload.spec.depth)
    host, known = m.host_budget_bytes, machine.host_bytes
    if machine.device_type == "cuda" and host is not None:
        machine = replace(
            machine, host_bytes=host if known is None else _capped("host_budget", host, "the host", known)
        )
    found = search(step, machine, budget_bytes - machine.base_bytes)
    chosen = choose(found, budget_bytes - machine.base_bytes)
    least = min(found, key=lambda candidate: (not candidate.fits_host, candidate.peak_bytes))
    if (
        recipe.model.quant_head
        and find_task(recipe).describe_model(recipe).config.tie_word_embeddings
        and not (chosen or least).options.host_embeddings
    ):
        log.warning(
            "model.quant_head: the embeddings are also the head, and their 16-bit table stays on the device: "
            "the 4-bit copy takes memory and saves none"
        )
    _warn_of_length(job, max(shape.lengths) if shape else tokens)
    return Plan(
        recipe=recipe,
        machine=machine,
        budget_bytes=budget_bytes,
        chosen=chosen or least,
        fits=chosen is not None,
        found=tuple(found),
        step=step,
        kept_checkpoints=recipe.train.keep_checkpoints,
        learning_rate=learning_rate(recipe),
    )


def _check_counts(fixed: Mapping[str, Any], blocks: int) -> None:
    problems = [
        f"memory.{name} = {fixed[name]}: the model has {blocks} blocks; write at most as many"
        for name in ("uncheckpointed_layers", "resident_layers")
        if (fixed.get(name) or 0) > blocks
    ]
    if problems:
        raise RecipeError(problems)


def budget_of(recipe: Recipe, machine: Machine) -> int:
    """Return the most memory that a recipe's run may use, in bytes: its own limit, but not more than there is."""
    budget = recipe.memory.budget_bytes
    return machine.memory_bytes if budget is None else _capped("budget", budget, machine.name, machine.memory_bytes)


def _capped(key: str, given: int, where: str, there: int) -> int:
    """Return the bytes that a recipe gives, or those that are there if they are fewer."""
    if given > there:
        log.warning(
            "memory.%s: %s is more than %s has, %s; that is the budget",
            key,
            format_bytes(given),
            where,
            format_bytes(there),
        )
    return min(given, there)


def expected_peak(plan: Plan, largest, evaluation) -> Prediction:
    """Predict the very step that a run probes, and saves nothing of: its own largest batches, in the chosen way."""
    job = plan.chosen.prediction.job
    shapes = job.workload.batches.shape(largest), evaluation and job.workload.batches.shape(evaluation)
    return predict(replace(job, shape=shapes[0], eval_shape=shapes[1], saved_adapters=0))


def as_measured(plan: Plan, expected: Prediction) -> int:
    """Return a prediction as ``memory.meter`` counts: what is allocated on a GPU, the whole process on a CPU."""
    if plan.machine.device_type == "cuda":
        return expected.allocated_bytes
    return plan.machine.base_bytes + expected.peak_bytes


def alternatives(plan: Plan) -> Iterator[Alternative]:
    """Yield what one change to the chosen plan would need: what the search saw, then single memory options, then the
    task."""
    chosen, step = plan.chosen, plan.step
    seen = {""}
    for other in plan.found:
        change = _difference(chosen, other)
        if change not in seen and change.count("=") + (other.packs != chosen.packs) <= MAX_CHANGES:
            yield _alternative(plan, change, other)
        seen.add(change)
    known = {(other.options, other.packs): other for other in plan.found}
    fewer = [] if "loss_chunk_tokens" in step.fixed else [replace(chosen.options, loss_chunk_tokens=SMALL_CHUNK_TOKENS)]
    for options in (*fewer, *single_changes(step, chosen.options)):
        other = known.get((options, chosen.packs)) or build_candidate(step, plan.machine, options, chosen.packs)
        change = _difference(chosen, other)
        if change not in seen:
            yield _alternative(plan, change, other)
        seen.add(change)
    job = step.job
    name = job.optimizer.removeprefix("paged_")
    states = {"8bit": "32bit", "32bit": "8bit"}
    family, _, bits = name.rpartition("_")
    optimizer = f"{family}_{states[bits]}" if bits in states else "adamw_8bit"
    changed = {f"train.optimizer={optimizer}": replace(step, job=replace(job, optimizer=optimizer))}
    tokens, several = step.pack.tokens, len(step.pack.lengths) > 1
    full_pack = job.workload.batches.full_pack
    if step.pack == full_pack(tokens, several) and tokens >= 128:
        evaluation = full_pack(tokens // 2, len(job.eval_shape.lengths) > 1) if job.eval_shape else None
        half_job = replace(job, eval_shape=evaluation)
        half = replace(step, pack=full_pack(tokens // 2, several), job=half_job)
        changed[f"data.max_tokens={tokens // 2}"] = half
    work, task = job.workload, find_task(plan.recipe)
    if not task.quantizes and isinstance(work.spec, TransformerSpec) and not work.method.trains_base:
        quant = "none" if work.spec.is_quantized else "nf4"  # what 4 bits save
        stored = replace(work, spec=replace(work.spec, quant=quant))
        changed[f"model.quant={quant}"] = replace(step, job=replace(job, workload=stored), known={})
    for change, other_step in changed.items():
        yield _alternative(plan, change, build_candidate(other_step, plan.machine, chosen.options, chosen.packs))


def _difference(chosen: Candidate, other: Candidate) -> str:
    """Say in recipe keys how a candidate differs from the chosen one; of its micro-batches in words, since the packs of
    a step stay the same, and ``train.micro_batch_size`` alone would change them."""
    theirs, ours = other.settings, chosen.settings
    options = [
        f"{key}={_as_yaml(value)}"
        for key, value in theirs.items()
        if value != ours[key] and not key.startswith("train.")
    ]
    parts = [" ".join(options)] if options else []
    if other.packs != chosen.packs:
        parts.append(f"micro-batch size {other.packs}, micro-batches {other.micro_batches}")
    return ", ".join(parts)


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _alternative(plan: Plan, change: str, candidate: Candidate) -> Alternative:
    peak = plan.machine.base_bytes + candidate.peak_bytes
    return Alternative(change, peak, candidate.step_seconds, candidate.fits(plan.limit_bytes), candidate.fits_host)


def max_tokens(plan: Plan) -> int:
    """Return the most data.max_tokens that fits when every memory option that is left to the planner saves most; a
    multiple of 64.

    Raises:
        DoesNotFitError: not even 64 tokens fit.
    """
    return longest_pack(plan)[0]


def longest_pack(plan: Plan) -> tuple[int, Candidate]:
    """Return ``max_tokens`` and the way to run packs of that length."""
    step, start = plan.step, 2 * plan.chosen.prediction.job.shape.tokens
    job = longest_job(step, plan.limit_bytes, plan.machine.host_bytes, start, MAX_TOKENS)
    packs = packs_at_once(step)
    tokens = job.shape.tokens // packs
    _warn_of_length(job, tokens)
    micro_batches = step.packs * step.micro_batches // packs
    return tokens, timed(plan.machine, job.options, packs, micro_batches, predicted(step, job))


def _warn_of_length(job: Job, tokens: int) -> None:
    positions = job.workload.spec.most_positions
    if positions and tokens > positions:
        log.warning(
            "a row of %s tokens is longer than the %s that the model was made for (max_position_embeddings): "
            "what it learns there may be of no use",
            f"{tokens:,}",
            f"{positions:,}",
        )


def max_batch(plan: Plan) -> int:
    """Return how many packs fit into one micro-batch when every memory option that is left to the planner saves most:
    up to ``MAX_PACKS``, which says that no more were looked for.

    Raises:
        DoesNotFitError: not even one fits.
    """
    pack, job = plan.step.pack, plan.chosen.prediction.job

    def job_of(packs: int, options: MemoryOptions) -> Job:
        return replace(job, shape=pack.times(packs), options=options)

    found, limits = 0, (plan.limit_bytes, plan.machine.host_bytes)
    reason: DoesNotFitError | None = None
    for options in reversed([plan.chosen.options, first_options(plan.step), *smaller(plan.step)]):
        if found == MAX_PACKS:
            break
        if found and not predicted(plan.step, job_of(found + 1, options)).fits(*limits):
            continue  # what saves most of the device may ask most of the host, so that no way is the best for sure
        try:
            found = most_packs(partial(job_of, options=options), *limits, MAX_PACKS, partial(predicted, plan.step))
        except DoesNotFitError as error:
            reason = error
    if reason is not None and not found:
        raise reason
    return found


def largest_resolution(recipe: Recipe, machine: Machine, budget_bytes: int) -> int:
    """Return the largest ``data.resolution`` of which some plan fits, found in steps of about ``RESOLUTION_STEP``
    pixels; 0 if there is none.

    Raises:
        ModelError: the model takes pictures of one size alone.
    """
    task = find_task(recipe)
    multiple = task.resolution_multiple(recipe)
    if not multiple:
        raise ModelError(f"{recipe.model.path} takes pictures of its own size alone; remove --max-resolution")
    step = -(-RESOLUTION_STEP // multiple) * multiple

    def missing(steps: int) -> int:
        data = recipe.data.model_copy(update={"resolution": steps * step})
        return not plan_recipe(recipe.model_copy(update={"data": data}), machine, budget_bytes).fits

    limit = task.max_resolution(recipe)
    return step * most(missing, 0, int(min(MAX_RESOLUTION, limit)) // step)


def does_not_fit(plan: Plan, others: Sequence[Alternative]) -> DoesNotFitError:
    """Say what would be needed, what for, and the smallest change that fits."""
    return DoesNotFitError(f"does not fit: {_shortage(plan)}; {_cure(plan, others)}")


def _shortage(plan: Plan) -> str:
    if plan.peak_bytes <= plan.budget_bytes:
        return f"{_of_host(plan, plan.chosen)} beside {plan.machine.name}"
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in _largest(plan.breakdown))
    return (
        f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)} on {plan.machine.name}, "
        f"{format_bytes(plan.peak_bytes - plan.budget_bytes)} too much ({parts})"
    )


def _of_host(plan: Plan, candidate: Candidate) -> str:
    needed, limit = candidate.prediction.host_bytes, plan.machine.host_bytes
    assert limit is not None  # else it would fit
    return f"{format_bytes(needed)} of host memory where {format_bytes(limit)} may be used"


def _cure(plan: Plan, others: Sequence[Alternative]) -> str:
    fitting = [a for a in others if a.fits]
    for alternative in fitting:
        if not alternative.change.startswith("data.max_tokens"):
            return f"{alternative.change} needs {format_bytes(alternative.peak_bytes)} and fits"
    if fitting:
        return _shorter(plan)
    beside = [c for c in plan.found if c.peak_bytes <= plan.limit_bytes and c is not plan.chosen]
    if beside:  # which the host has no room for
        least = min(beside, key=lambda candidate: candidate.prediction.host_bytes)
        return f"{_difference(plan.chosen, least)} would fit with {_of_host(plan, least)}: {_more_host(plan, least)}"
    if not plan.chosen.fits_host:
        return f"free host memory, or {_more_host(plan, plan.chosen)}"
    resident = plan.chosen.prediction.simulation.resident
    trained = sum(resident.breakdown.get(name, 0) for name in (*TRAINED, "optimizer"))
    method = plan.step.job.workload.method
    size = method.size_setting
    fewer = f"lower {size}" if size else "choose a smaller model, or adapter.method lora"
    if method.trains_base and not plan.chosen.options.optimizer_in_backward:
        fewer = f"write memory.optimizer_in_backward: true and train.max_grad_norm: 0, {fewer}"
    constants = plan.machine.base_bytes + sum(overhead.bytes for overhead in plan.chosen.prediction.overheads)
    if constants > plan.budget_bytes:
        return f"what such a process needs beside tensors takes {format_bytes(constants)} alone: give it more memory"
    if trained > plan.budget_bytes:
        return f"what is trained and its optimizer alone take {format_bytes(trained)}: {fewer}"
    floor = constants + resident.total
    if floor > plan.budget_bytes:
        cure = fewer if floor - trained <= plan.budget_bytes else "choose a smaller model"
        return f"its weights, adapter, optimizer and constants alone take {format_bytes(floor)}: {cure}"
    try:
        return _shorter(plan)
    except DoesNotFitError:
        return f"no sequence length fits: {fewer if method.trains_base else 'choose a smaller model'}" + (
            f" or a lower {size}" if size else ""
        )


def _shorter(plan: Plan) -> str:
    what_else = "longer rows are an error, unless data.overflow says what to do with them"
    return f"data.max_tokens={max_tokens(plan)} fits ({what_else})"


def _more_host(plan: Plan, candidate: Candidate) -> str:
    """Say what makes room in host memory for a candidate."""
    on_disk = replace(candidate.options, offload_folder=".")
    disk_helps = on_disk.uses_disk and build_candidate(plan.step, plan.machine, on_disk, candidate.packs).fits_host
    has_to_hold_all = candidate.options.resident_layers is not None and plan.step.fixed.get("stream_from") == "host"
    return (
        "raise memory.host_budget"
        + (", or name a disk in memory.offload_folder" if disk_helps else "")
        + (", or set memory.stream_from to auto" if has_to_hold_all else "")
    )


def _largest(breakdown: dict[str, int], count: int = 4) -> list[tuple[str, int]]:
    return sorted(breakdown.items(), key=lambda item: -item[1])[:count]


def host_bytes(plan: Plan) -> int:
    """Memory of the host: the whole process on a CPU; beside a GPU, libraries and what is kept off the GPU."""
    if plan.machine.device_type == "cpu":
        return plan.peak_bytes
    return plan.chosen.prediction.host_bytes


def disk_bytes(plan: Plan) -> int:
    """Room on the disk: the quantised model in the cache, where it is quantised here, and what the run writes.

    Of a model that memory has no room for, the weights lie there twice while it is prepared; and packed weights that
    are put together as they are loaded do, for each rank, where blocks stay in files.
    """
    simulation = plan.chosen.prediction.simulation
    work, with_evaluation = plan.step.job.workload, plan.step.job.eval_shape is not None
    # all of a model is in its folder, trained or not
    written, states, options = simulation.saved_bytes, simulation.state_bytes, plan.chosen.options
    if work.method.trains_base:
        divided = options.is_sharded
        written = simulation.frozen_bytes + (simulation.saved_bytes if divided else simulation.trained_bytes)
        states *= options.shards.count if divided else 1  # of whole weights they are counted for each rank
    space = Space(written, states, with_evaluation, plan.kept_checkpoints)
    is_prepared = work.spec.is_quantized and not work.spec.keeps_codes
    times = 2 if plan.chosen.options.weights_on_disk else 1
    stacked = options.loads_from_files * (options.shards.count if options.is_sharded else 1) * work.spec.stacked_bytes
    return is_prepared * times * simulation.frozen_bytes + stacked + space.whole_bytes()
