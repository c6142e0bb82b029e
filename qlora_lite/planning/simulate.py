"""Run the real training step on tensors without memory and keep its ledger.

They are plain tensors on torch's meta device: each has a shape and a storage with a size. (A ``FakeTensorMode``
does more for each operation, in Python.)

Nothing here knows what a step does: it has the workload build its skeleton, builds the real optimizer, and calls
``train.memory_probe`` below a ``Ledger`` and a ``WorkCounter``. One pass shows the steady state: the optimizer has
its states already, and with gradient accumulation the gradients of the earlier micro-batches are there.

The blocks of a decoder repeat, so a deep model is run at two small depths and continued in a straight line,
separately for each phase and for the first block, the last one and all that is outside of blocks: what is alive
at a given point of the step grows by the same bytes with every block, and between the first and the last block
it changes by the same bytes from block to block, so the peak stands at one of them. Where the last blocks run
differently (kept, or resident beside streamed ones) there are two such rows of blocks and two slopes. The tests
compare with the whole depth, byte for byte.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from math import lcm, prod
from operator import attrgetter
from typing import Literal, NamedTuple, overload

import torch
from torch import nn

from qlora_lite.errors import ModelError, first_line
from qlora_lite.memory.ledger import Moment
from qlora_lite.memory.marks import category, phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.memory.work import Work, WorkCounter
from qlora_lite.models.memory_options import MemoryOptions, stream_of, trained_on_host
from qlora_lite.offload.stream import spare_bytes
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.determinism import deterministic
from qlora_lite.train.divided_weights import Parts, parts_of, trained_here
from qlora_lite.train.inventory import categorised
from qlora_lite.train.memory_probe import probe_step, probe_update
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.out_of_memory import is_out_of_memory
from qlora_lite.train.workload import Workload

from .meta_results import MetaResults, NeedsValuesError
from .plan_ledger import PlanLedger, on_real_tensors

log = logging.getLogger("qlora_lite")
META, CPU = torch.device("meta"), torch.device("cpu")
_KNOWN_UPDATES = 64  # of jobs whose factors or optimizers differ
remembered, with_values = MetaResults(), MetaResults(with_values=True)


@dataclass(frozen=True, slots=True)
class Job:
    """A training step to be planned: what is trained, and everything that changes its memory.

    ``device_type`` is that of the machine planned for, "cpu" or "cuda", and ``capability`` its GPU's, if that is known;
    the other fields have the recipe's names and meanings. ``shape`` is that of the largest micro-batch and
    ``eval_shape`` that of the largest evaluation batch, None without one. ``saved_adapters``: how many adapters a
    checkpoint holds that is written beside the step (2 with that which was best by evaluation), 0 where none is.
    """

    workload: Workload
    shape: BatchShape
    eval_shape: BatchShape | None
    device_type: str = "cpu"
    optimizer: str = "adamw_8bit"
    stochastic_rounding: bool = True
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0
    accumulating: bool = False
    deterministic: bool = False
    saved_adapters: int = 0
    options: MemoryOptions = field(default_factory=MemoryOptions)
    capability: tuple[int, int] | None = None


class Trained(NamedTuple):
    """What an update needs to know of a parameter; ``part_of``: how many values the weight has that it is a part of,
    which ranks have divided, 0 of a whole one."""

    shape: torch.Size
    dtype: torch.dtype
    lr_ratio: float
    part_of: int = 0


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a step holds and does: the highest moment of each (phase, module), what stays, and the work."""

    moments: dict[tuple[str, str], Moment]
    resident: Moment  # between two steps
    work: Work
    offloaded_bytes: int = 0  # most that lay in host memory
    folder_bytes: int = 0  # most that lay in files of ``options.offload_folder``
    frozen_bytes: int = 0  # the model without the adapter, wherever it lies
    saved_bytes: int = 0  # of all that a run trains, as its files hold it
    state_bytes: int = 0  # of optimizer states, wherever they lie
    measured_because: str = ""  # the operator that cannot run without values, where real tensors were measured
    streamed_sizes: tuple[int, ...] = ()  # bytes of the first streamed blocks, of each kind at least one
    trained: tuple["Trained", ...] = ()

    @property
    def trained_bytes(self) -> int:
        """Bytes of what is trained at a time, wherever it lies."""
        return sum(prod(each.shape) * each.dtype.itemsize for each in self.trained)

    @property
    def trained_numbers(self) -> int:
        """How many numbers of whole weights are trained at a time: each rank has gradients of all of them."""
        return sum(prod(each.shape) for each in self.trained if not each.part_of)

    @property
    def part_numbers(self) -> int:
        """How many numbers of divided weights this rank trains at a time."""
        return sum(prod(each.shape) for each in self.trained if each.part_of)

    def peak(self, name: str | None = None) -> Moment:
        """Return the highest moment of a phase, or of all."""
        return max((m for m in self.moments.values() if name in (None, m.phase)), key=lambda m: m.total)

    def first_step_bytes(self) -> int:
        """Return the peak of a run's very first step, in whose forward and backward no optimizer state exists yet."""
        return max(
            moment.total - (0 if moment.phase == "optimizer" else moment.breakdown.get("optimizer", 0))
            for moment in self.moments.values()
            if moment.phase in ("forward", "backward", "optimizer")
        )


def simulate(job: Job) -> Simulation:
    """Return the memory and work of a step at the model's own depth.

    Raises:
        ModelError: the configuration is not that of a causal language model, or a target matches nothing.
    """
    last = _last_blocks(job)
    if last is None:
        return simulate_whole(job)
    if last:
        return along_last_blocks(job)(last)
    return _as_allocated(job, _repeating(job))


def _repeating(job: Job) -> Simulation:
    """Simulate a model whose blocks all run in the same way, or in a few ways in turn."""
    depth, (unlike, pattern) = job.workload.spec.depth, _pattern(job)
    front = unlike + -(-_front(job) // pattern) * pattern
    shallow, deeper = front + pattern, front + 2 * pattern
    if depth <= deeper:
        return _on_meta(job)
    small, large = (
        _ends(job, _on_meta(_at_depth(job, layers)), layers, 0, (front, pattern)) for layers in (shallow, deeper)
    )
    return _continued(job, small, [(large, (depth - shallow) // pattern)], 0)


def _pattern(job: Job) -> tuple[int, int]:
    """Return how many of the first blocks run in ways of their own, and after how many the others repeat."""
    unlike, pattern = job.workload.spec.pattern(job.workload.method)
    if job.options.recomputes:  # in segments that are counted from the last block
        pattern = lcm(pattern, job.options.layers_per_checkpoint)
        unlike += (job.workload.spec.depth - unlike) % pattern
    return unlike, pattern


def _front(job: Job) -> int:
    """Return how many of the first blocks need more than those that follow, being of their kind.

    The first has all gradients beside it, but none of its input's: inside attention, of which a GPU's kernel takes
    most, the second can need more. With checkpoints in host memory, that one has the first's input too.
    """
    return 2 if job.options.offload_checkpoints or job.device_type == "cuda" else 1


def _last_blocks(job: Job) -> int | None:
    """Return how many of the last blocks run differently from those before; None if there are three kinds."""
    options, depth = job.options, job.workload.spec.depth
    kept = min(options.uncheckpointed_layers, depth) if options.recomputes else 0
    resident = 0 if options.resident_layers is None else min(options.resident_layers, depth)
    if kept and resident and kept != resident:
        return None
    return max(kept, resident) % depth


def along_last_blocks(job: Job) -> Callable[[int], Simulation]:
    """Return a function that simulates the job with another number of last blocks that are kept (or resident).

    It grows in a straight line with the blocks of either kind: three small models show both slopes, and two where there
    are so few of the first kind that they are all in them.
    """
    depth, (unlike, pattern) = job.workload.spec.depth, _pattern(job)

    def with_last(count: int, layers: int) -> Job:
        options = job.options
        kept = count if options.uncheckpointed_layers else 0
        resident = options.resident_layers and count
        return replace(
            _at_depth(job, layers), options=replace(options, uncheckpointed_layers=kept, resident_layers=resident)
        )

    front = unlike + _front(job)
    few = front + 1
    if pattern > 1 or depth < few + 4:
        return lambda count: simulate_whole(with_last(count, depth))

    @cache
    def of(first: int, last: int) -> _Ends:
        return _ends(job, _on_meta(with_last(last, first + last)), first + last, last, (front, 1))

    def at(count: int) -> Simulation:
        if not 2 <= count <= depth - max(1, unlike):  # else some of the last blocks are of another kind
            return simulate_whole(with_last(count, depth))
        first = min(few, depth - count)
        more = ((first + 1, 2), depth - count - first), ((first, 3), count - 2)
        found = _continued(job, of(first, 2), [(of(*sizes), steps) for sizes, steps in more if steps], count)
        return _as_allocated(with_last(count, depth), found)

    return at


@overload
def simulate_whole(job: Job) -> Simulation: ...
@overload
def simulate_whole(job: Job, timeline: Literal[True]) -> tuple[Simulation, list[Moment]]: ...
def simulate_whole(job, timeline=False):
    """Return the memory and work of a step, every block of the model run; with the timeline if asked for."""
    if timeline:
        simulation, moments = _on_meta(job, timeline)
        return _as_allocated(job, simulation), moments
    return _as_allocated(job, _on_meta(job))


def _as_allocated(job: Job, simulation: Simulation) -> Simulation:
    """Add to what lies in host memory what the allocations of streamed blocks take beyond them.

    They are shared between blocks, so that it does not grow in a straight line.
    """
    sizes = list(map(job.options.shards.own_bytes, streamed_sizes(job, simulation)))
    if not sizes or job.options.stream_from != "host" or job.device_type != "cuda":
        return simulation
    return replace(simulation, offloaded_bytes=simulation.offloaded_bytes + spare_bytes(sizes))


def streamed_sizes(job: Job, simulation: Simulation) -> list[int]:
    """Return the bytes of each streamed block of a job's model."""
    (unlike, pattern), sizes = _pattern(job), simulation.streamed_sizes
    streamed = job.options.streamed_of(job.workload.spec.depth)
    return [sizes[n if n < unlike else unlike + (n - unlike) % pattern] for n in range(streamed)]


@overload
def _on_meta(job: Job) -> Simulation: ...
@overload
def _on_meta(job: Job, timeline: Literal[True]) -> tuple[Simulation, list[Moment]]: ...
def _on_meta(job, timeline=False):
    """Run the step on tensors without values.

    An operator that cannot, or whose result's shape depends on them, is no reason to guess: the step then runs on real
    tensors, and the log and the result say so.
    """
    try:
        return _run(job, META, timeline)
    except NeedsValuesError as error:
        _say_measured(job.workload.spec.name, str(error))
        return _run(job, CPU, timeline, str(error))


@contextmanager
def _explaining_forward(name: str, is_quantized: bool) -> Iterator[None]:
    """Say of a model that its forward does not go with what this package does to it, and not with a trace."""
    try:
        yield
    except NeedsValuesError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        packed = (
            ", or 16-bit weights of layers that are packed; model.keep_16bit or model.quant none may leave those alone"
        )
        raise ModelError(
            f"a model of the type {name} cannot be trained so ({first_line(error)}): its own code asks "
            f"for what it is not given, such as a mask{packed * is_quantized}"
        ) from error


@cache
def _say_measured(name: str, why: str) -> None:
    """Say it once, and not for each candidate."""
    log.warning(
        "plan: of this %s, steps are measured on the processor with real tensors, which takes their memory and "
        "minutes for a large model, since %s",
        name,
        why,
    )


def _run(job: Job, device: torch.device, timeline: bool, measured_because: str = ""):
    workload = job.workload.with_options(job.options)
    with planning_for(job.device_type):
        model = workload.spec.planned_model(workload.method, device, _as_counted(job), job.shape)
    names, parameters = zip(*trained_here(workload.method, model).items(), strict=True)
    parts = parts_of(model)
    lr_ratios = workload.method.lr_ratios(names, job.loraplus_lr_ratio)
    settings = job.device_type, job.optimizer, job.stochastic_rounding
    optimizer = _optimizer(*settings, parameters, lr_ratios, trained_on_host(model), parts)
    remember = with_values if workload.spec.needs_values(model) else remembered
    counter, run = WorkCounter(), remember if device == META else on_real_tensors
    ledger = PlanLedger(job.device_type, timeline=timeline, work=counter, run=run)
    with planning_for(job.device_type, job.capability), deterministic(job.deterministic), ledger:
        for tensor, name, _ in categorised(workload, model):
            ledger.claim([tensor], name)
        in_files = ledger.now().breakdown.get("on disk", 0)  # the weights themselves
        ledger.watch(model)
        eval_inputs = workload.batches.planned_inputs(job.eval_shape, device) if job.eval_shape else None
        with _explaining_forward(workload.spec.name, workload.spec.is_quantized):
            probe_step(
                workload,
                model,
                parameters,
                optimizer,
                workload.batches.planned_inputs(job.shape, device),
                eval_inputs,
                job.max_grad_norm,
                job.accumulating,
                job.options.optimizer_in_backward,
                job.shape.lengths,
            )
        resident, moments = ledger.now(), list(ledger.timeline or ())  # what follows is only the model's end
    frozen = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad)
    saved = sum(tensor.nbytes for tensor in workload.method.tensors(model).values())
    states = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )
    work = counter.work._replace(operations=0) if job.options.compile else counter.work  # how few it has is not known
    stream = stream_of(model)
    simulation = Simulation(
        dict(ledger.peaks),
        resident,
        work,
        ledger.offloaded_peak_bytes,
        ledger.disk_peak_bytes - in_files,
        frozen,
        saved,
        states,
        measured_because,
        tuple(stream.sizes) if stream else (),
        tuple(
            Trained(p.shape, p.dtype, ratio, parts.values.get(p, 0))
            for p, ratio in zip(parameters, lr_ratios, strict=True)
        ),
    )
    return (simulation, moments) if timeline else simulation


def _as_counted(job: Job) -> MemoryOptions:
    """Return the memory options as a plan runs them: compiled blocks are counted as plain ones."""
    is_plain = job.options.compile or job.deterministic
    return replace(job.options, compile=False, kernels="plain" if is_plain else job.options.kernels)


def _optimizer(
    device_type: str,
    name: str,
    stochastic_rounding: bool,
    parameters: Sequence[nn.Parameter],
    lr_ratios: Sequence[float],
    on_host: Sequence[nn.Parameter] = (),
    parts: Parts | None = None,
) -> torch.optim.Optimizer:
    with planning_for(device_type):  # and below no ledger: its tables are real numbers
        return build_optimizer(parameters, name, 0.0, 0.0, stochastic_rounding, lr_ratios, on_host, parts=parts)


def _at_depth(job: Job, layers: int) -> Job:
    return replace(job, workload=job.workload.at_depth(layers))


_ELSEWHERE = attrgetter("offloaded_bytes", "folder_bytes", "frozen_bytes", "saved_bytes", "state_bytes")
_BLOCK = re.compile(r"\.(\d+)(?=\.|$)")


class _Ends(NamedTuple):
    """A shallow simulation with its moments keyed by phase, module and place.

    A place is (kind, number): the first blocks and the last ones of each kind ("first": those that the whole
    depth has more of, "last": those that run differently), counted from the nearer end; None outside of blocks.
    """

    simulation: Simulation
    moments: dict[tuple[str, str, tuple[str, int] | None], Moment]


def _ends(job: Job, simulation: Simulation, layers: int, last: int, ends: tuple[int, int]) -> _Ends:
    """Key the moments of a simulation; ``ends`` is how many blocks of a kind are kept from its start and its end."""
    found, beside = {}, tuple(f"{path}." for path in job.workload.spec.beside_blocks)
    for (name, module), moment in simulation.moments.items():
        block = None if module.startswith(beside) else _BLOCK.search(module)
        place = block and _place(int(block[1]) + _before(job, module), layers - last, last, *ends)
        if block is None or place is not None:
            found[name, _BLOCK.sub(".#", module, count=1) if block else module, place] = moment
    return _Ends(simulation, found)


def _place(number: int, first: int, last: int, front: int, back: int) -> tuple[str, int] | None:
    kind, number, count = ("first", number, first) if number < first else ("last", number - first, last)
    if number >= count - back:
        return kind, number - count
    return (kind, number) if number < front else None


def _continued(job: Job, base: _Ends, slopes: Sequence[tuple[_Ends, int]], last: int) -> Simulation:
    """Continue a simulation in straight lines: for each (simulation one step on, steps) add steps differences.

    An update of all factors is run as it is, since of many factors it has some at a time.
    """
    depth = job.workload.spec.depth

    def line(values: Callable[[_Ends], Sequence[int]]) -> tuple[int, ...]:
        start = values(base)
        others = [(values(other), steps) for other, steps in slopes]
        return tuple(x + sum((other[i] - x) * steps for other, steps in others) for i, x in enumerate(start))

    moments: dict[tuple[str, str], Moment] = {}
    for key in base.moments:
        if all(key in other.moments for other, _ in slopes):
            name, module, place = key
            if place is not None:
                module = module.replace("#", str(_number(place, depth, last) - _before(job, module)), 1)
            moments[name, module] = Moment(name, module, line(partial(lambda key, ends: ends.moments[key].bytes, key)))
    trained = base.simulation.trained
    trained += sum((other.simulation.trained[len(trained) :] * steps for other, steps in slopes), ())
    if not job.options.optimizer_in_backward:
        settings = job.device_type, job.optimizer, job.stochastic_rounding, job.max_grad_norm, job.deterministic
        updated = _update(*settings, trained)
        for at, moment in moments.items():
            if moment.phase in updated:
                moments[at] = moment.with_category("optimizer", updated[moment.phase].breakdown["optimizer"])
    resident = base.simulation.resident
    offloaded, in_folder, frozen, saved, states = line(lambda ends: _ELSEWHERE(ends.simulation))
    return Simulation(
        moments,
        Moment(resident.phase, "", line(lambda ends: ends.simulation.resident.bytes)),
        Work(*line(lambda ends: ends.simulation.work)),
        offloaded,
        in_folder,
        frozen,
        saved,
        states,
        base.simulation.measured_because,
        base.simulation.streamed_sizes,
        trained,
    )


@lru_cache(_KNOWN_UPDATES)
def _update(
    device_type: str,
    optimizer_name: str,
    stochastic_rounding: bool,
    max_grad_norm: float,
    is_deterministic: bool,
    trained: tuple[Trained, ...],
) -> dict[str, Moment]:
    """Return the highest moments of updates of such parameters, where nothing else lies in memory, by phase: of the
    first, which makes the states, "load", and of any later one, "optimizer"."""
    parameters = [nn.Parameter(torch.empty(each.shape, dtype=each.dtype, device=META)) for each in trained]
    parts = {p: each.part_of for p, each in zip(parameters, trained, strict=True) if each.part_of}
    settings = device_type, optimizer_name, stochastic_rounding
    optimizer = _optimizer(*settings, parameters, [each.lr_ratio for each in trained], parts=Parts(parts))
    ledger = PlanLedger(device_type, run=remembered)
    with planning_for(device_type), deterministic(is_deterministic), ledger:
        ledger.claim(parameters, "adapter")
        with category("gradients"):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        with phase("load"), category("optimizer"):
            optimizer.step()
        probe_update(parameters, optimizer, max_grad_norm)
    highest = sorted(ledger.peaks.values(), key=lambda moment: moment.total)
    return {moment.phase: moment for moment in highest}


def _before(job: Job, module: str) -> int:
    """Return how many blocks are in lists before that which a module is in."""
    return next((count for path, count in job.workload.spec.blocks_before.items() if module.startswith(f"{path}.")), 0)


def _number(place: tuple[str, int], depth: int, last: int) -> int:
    """Return the number of the block at a place, at the whole depth."""
    kind, number = place
    start, count = (0, depth - last) if kind == "first" else (depth - last, last)
    return start + number if number >= 0 else start + count + number
