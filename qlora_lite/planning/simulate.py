"""Run the real training step on fake tensors and keep its ledger.

Nothing here knows what a step does: it builds the model's skeleton and the real optimizer, and calls
``train.rehearsal`` below a ``Ledger`` and a ``WorkCounter``. One pass shows the steady state: the optimizer has
its states already, and with gradient accumulation the gradients of the earlier micro-batches are there.

The blocks of a decoder repeat, so a deep model is run at two small depths and continued in a straight line,
separately for each phase and for the first block, the last one and all that is outside of blocks: what is alive
at a given point of the step grows by the same bytes with every block, and between the first and the last block
it changes by the same bytes from block to block, so the peak stands at one of them. The tests compare with
the whole depth, byte for byte.
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from qlora_lite.data.batch import Batch
from qlora_lite.lora.inject import Target, add_lora, lora_parameters
from qlora_lite.memory.ledger import CATEGORIES, Ledger, Moment
from qlora_lite.memory.work import Work, WorkCounter
from qlora_lite.models.anatomy import set_checkpointing
from qlora_lite.models.skeleton import block_pattern, give_storage, meta_model, shallow_config
from qlora_lite.ops.shapes import planning_for
from qlora_lite.train.inventory import categorised
from qlora_lite.train.optim import build_optimizer
from qlora_lite.train.rehearsal import rehearse_step
from qlora_lite.train.step import Inputs, filler_tokens, labelled_count

UNPLANNABLE = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)  # fmt: skip
ALLOCATION_BYTES = {"cuda": 512, "cpu": 1}  # CUDA's caching allocator rounds up (c10/cuda/CUDACachingAllocator.cpp)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a micro-batch: the tokens of each, and how many tokens of all are learned."""

    lengths: tuple[int, ...]
    learned: int


def rows_of(batch: Batch) -> Rows:
    """Return the shape of a batch."""
    return Rows(batch.row_lengths, labelled_count(batch))


@dataclass(frozen=True, slots=True)
class Job:
    """A training step to be planned: a model's configuration and everything that changes its memory.

    ``config`` is transformers'; ``device_type`` is that of the machine planned for, "cpu" or "cuda"; the other
    fields have the recipe's names and meanings. ``rows`` is the largest micro-batch and ``eval_rows`` the
    largest evaluation batch (None: there is none).
    """

    config: object
    rows: Rows
    eval_rows: Rows | None
    device_type: str = "cpu"
    quant: str = "nf4"
    double_quant: bool = True
    compute_dtype: torch.dtype = torch.bfloat16
    targets: tuple[Target, ...] = (Target("all-linear"),)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    factor_dtype: torch.dtype = torch.bfloat16
    optimizer: str = "paged_adamw_8bit"
    max_grad_norm: float = 1.0
    accumulating: bool = False
    checkpointing: str = "block"
    loss_chunk_tokens: int | None = None
    kept_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a step holds and does: the highest moment of each (phase, module), what stays, and the work."""

    moments: dict[tuple[str, str], Moment]
    resident: Moment  # between two steps
    work: Work
    offloaded_bytes: int = 0  # most that lay in host memory
    measured_because: str = ""  # the operator that has no fake kernel, where real tensors were measured instead

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
    depth, pattern = job.config.num_hidden_layers, block_pattern(job.config)
    shallow, deeper = 2 * pattern, 3 * pattern
    mixed = job.checkpointing == "block" and job.kept_blocks > 0
    if mixed or depth <= deeper or (depth - shallow) % pattern:
        return simulate_whole(job)
    small, large = (simulate_whole(_at_depth(job, layers)) for layers in (shallow, deeper))
    return _continued(small, large, (shallow, deeper, depth))


def simulate_whole(job: Job, timeline: bool = False) -> Simulation | tuple[Simulation, list[Moment]]:
    """Return the memory and work of a step, every block of the model run; with the timeline if asked for.

    An operator that has no fake kernel, or whose result's shape depends on values, is no reason to guess: the step
    then runs on real tensors, and the result says so.
    """
    try:
        return _run(job, FakeTensorMode(allow_non_fake_inputs=True), timeline)
    except UNPLANNABLE as error:
        operator = str(getattr(error, "func", "") or error).splitlines()[0]
        return _run(job, nullcontext(), timeline, measured_because=operator)


def _run(job: Job, mode, timeline: bool, measured_because: str = ""):
    with mode:
        model = _model(job)
    parameters = [parameter for _, parameter in lora_parameters(model)]
    optimizer = build_optimizer(parameters, job.optimizer, 0.0, 0.0)  # its tables are real numbers
    ledger = Ledger(timeline, ALLOCATION_BYTES[job.device_type])
    with mode, planning_for(job.device_type), ledger, WorkCounter() as counter:
        for tensor, name, _ in categorised(model):
            ledger.claim([tensor], name)
        ledger.watch(model)
        eval_inputs = _inputs(job.eval_rows, model.device) if job.eval_rows else None
        rehearse_step(
            model, parameters, optimizer, _inputs(job.rows, model.device), eval_inputs, job.max_grad_norm,
            job.loss_chunk_tokens, job.accumulating,
        )  # fmt: skip
        resident, moments = ledger.now(), list(ledger.timeline or ())  # what follows is only the model's end
    simulation = Simulation(
        dict(ledger.peaks), resident, counter.work, ledger.offloaded_peak_bytes, measured_because
    )  # fmt: skip
    return (simulation, moments) if timeline else simulation


def _model(job: Job) -> nn.Module:
    model = give_storage(meta_model(job.config, job.quant, job.double_quant, job.compute_dtype))
    add_lora(model, job.targets, job.rank, job.alpha, job.dropout, job.rslora, job.factor_dtype)
    set_checkpointing(model, job.checkpointing == "block", job.kept_blocks)
    return model


def _inputs(rows: Rows, device: torch.device) -> Inputs:
    tokens = sum(rows.lengths) + filler_tokens(rows.lengths, device)
    shapes = (1, tokens), (1, tokens), (rows.learned,), (rows.learned,)
    ids, positions, learned, targets = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
    return Inputs(ids, positions, rows.lengths, learned, targets)


def _at_depth(job: Job, layers: int) -> Job:
    return replace(job, config=shallow_config(job.config, layers))


_BLOCK = re.compile(r"\.(\d+)(?=\.|$)")


def _continued(small: Simulation, large: Simulation, depths: tuple[int, int, int]) -> Simulation:
    """Continue two simulations at small depths in a straight line to the third depth."""
    shallow, deeper, depth = depths
    pattern = deeper - shallow
    steps = (depth - shallow) // pattern

    def line(a: Moment, b: Moment, module: str) -> Moment:
        sizes = tuple(x + (y - x) * steps for x, y in zip(a.bytes, b.bytes, strict=True))
        return Moment(a.phase, module, sizes)

    def ends(simulation: Simulation, layers: int) -> dict:
        """Key the moments by phase, module and place: blocks from the nearer end, those in the middle left out."""
        found = {}
        for (name, module), moment in simulation.moments.items():
            number = _BLOCK.search(module)
            place = number and int(number[1])
            if place is not None and place >= layers - pattern:
                place -= layers
            if place is None or place < pattern:
                found[name, _BLOCK.sub(".#", module, count=1), place] = moment
        return found

    near, far = ends(small, shallow), ends(large, deeper)
    moments = {}
    for key in near.keys() & far.keys():
        name, module, place = key
        number = None if place is None else place + depth if place < 0 else place
        module = module.replace("#", str(number), 1)
        moments[name, module] = line(near[key], far[key], module)
    work = small.work.continued(large.work, steps)
    return Simulation(
        moments, line(small.resident, large.resident, ""), work,
        small.offloaded_bytes + (large.offloaded_bytes - small.offloaded_bytes) * steps, small.measured_because,
    )  # fmt: skip


def by_category(moment: Moment) -> dict[str, int]:
    """Return a moment's bytes for every category, zeros included."""
    return dict(zip(CATEGORIES, moment.bytes, strict=True))
