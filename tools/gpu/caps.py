"""Smaller GPUs on one large GPU: plans for a cap really run below it, and lengths above the longest really failing.

A GPU of N GiB is the allocator capped at N GiB less the context that every process has (``memory.process``). Without a
GPU there is no allocator to hold: a dry run compares the ledger and the plan's constants with the cap instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch

from common.cases import OUT_OF_MEMORY, free_memory, model_of, trainer_of, under_ledger
from common.models import config_of, dtype_of
from qlora_lite.adapters.lora.inject import lora_parameters
from qlora_lite.errors import DoesNotFitError
from qlora_lite.memory.meter import set_memory_limit
from qlora_lite.models.load import fast_dtype, resolve_device
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.candidate import Step, choose
from qlora_lite.planning.largest import LENGTH_STEP, longest
from qlora_lite.planning.machine import Machine, this_machine
from qlora_lite.planning.predict import predict
from qlora_lite.planning.search import first_options, search, smaller
from qlora_lite.planning.simulate import Job
from qlora_lite.prepare.plan import MAX_TOKENS, Plan, max_tokens
from qlora_lite.recipe.load import recipe_of
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import TextSpec, causal_lm
from qlora_lite.train.loop import Trainer
from qlora_lite.units import format_bytes

STEPS_ABOVE = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4)  # times the planned longest, until one fails
NOT_BUILT = "there is no room to build the model in, whose weights are made on the device"
MAX_STEP_SECONDS = 30.0  # by estimate; what takes longer is not tried


def machine_at_hand(device: torch.device) -> Machine:
    """Measure a device, a GPU in the type that it multiplies fastest."""
    return this_machine(device, fast_dtype(device) if device.type == "cuda" else torch.bfloat16)


def trained(trainer: Trainer) -> dict:
    """Take a trainer's steps as a run does; return the speed of the last."""
    *_, last = trainer
    return {"tokens_per_second": last.tokens_per_second}


class CappedDevice:
    """The device at hand, made to look like smaller GPUs; it keeps one placed model from case to case."""

    def __init__(self):
        self.device = resolve_device()
        self.machine = replace(machine_at_hand(self.device), base_bytes=0)
        self._key, self._model = None, None

    def run(
        self,
        name: str,
        tokens: int,
        options: MemoryOptions,
        cap_bytes: int,
        steps: int,
        overhead_bytes: int,
        train: Callable[[Trainer], dict] = trained,
        **case,
    ) -> dict:
        """Train some steps below a cap; return "fits", what training found and what was measured.

        Args:
            overhead_bytes: what the plan adds to the tensors, for devices that cannot be capped at a cap.
            train: takes the steps.
            case: what else is different (see ``common.cases``).
        """
        case |= {"model": name, "tokens": tokens, **asdict(options)}
        try:
            model = self._placed(case, options)
        except OUT_OF_MEMORY as error:
            return {"fits": False, "built": False, "error": str(error).partition(".")[0]}
        try:
            self._hold_to(cap_bytes)
            trainer = trainer_of(case, model, steps, computes=train is trained)
            try:
                found = train(trainer) | self._measured(trainer, overhead_bytes)
            finally:
                trainer.meter.close()
        except OUT_OF_MEMORY as error:
            return {"fits": False, "error": str(error).partition(".")[0]}
        finally:
            self._hold_to(None)
            for _, parameter in lora_parameters(model):
                parameter.grad = None
        return {"fits": self.device.type == "cuda" or found["measured_bytes"] <= cap_bytes, **found}

    def _placed(self, case: dict, options: MemoryOptions):
        key = case["model"], options.host_embeddings, options.host_head, options.resident_layers
        if key != self._key:
            self._key = self._model = None
            free_memory(self.device)
            self._key, self._model = key, model_of(case, self.device)
        return self._model

    def _hold_to(self, cap_bytes: int | None) -> None:
        free_memory(self.device)
        set_memory_limit(self.device, cap_bytes)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _measured(self, trainer, overhead_bytes: int) -> dict:
        if self.device.type != "cuda":
            return {"measured_bytes": under_ledger(trainer).peak.total + overhead_bytes}
        return {"measured_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def plan_below(machine: Machine, name: str, tokens: int, cap_bytes: int) -> Plan:
    """Plan one row of all target tokens a step, on a GPU of the cap's size."""
    config = config_of(name)
    job = Job(
        causal_lm(spec=TextSpec(config, compute_dtype=dtype_of(config))), BatchShape((1,), 1), None, machine.device_type
    )
    step = Step(job, BatchShape((tokens,), tokens - 1), 1, 1)
    found = search(step, machine, cap_bytes)
    chosen = choose(found, cap_bytes)
    least = min(found, key=lambda candidate: candidate.peak_bytes)
    recipe = recipe_of({"model": {"path": name}, "data": {"train": "not-read.jsonl"}}, (), name)
    return Plan(recipe, machine, cap_bytes, chosen or least, chosen is not None, tuple(found), step, 0, 0.0)


def chosen_row(capped: CappedDevice, name: str, tokens: int, cap_bytes: int) -> dict:
    """Run the planner's choice for a cap."""
    if cap_bytes > capped.machine.memory_bytes:
        return {"kind": "choice", "model": name, "cap_bytes": cap_bytes, "skipped": "the GPU has less free"}
    plan = plan_below(capped.machine, name, tokens, cap_bytes)
    row = {
        "kind": "choice",
        "model": name,
        "tokens": tokens,
        "cap_bytes": cap_bytes,
        "planned_to_fit": plan.fits,
        "planned_bytes": plan.peak_bytes,
        "chosen": plan.chosen.settings,
    }
    if not plan.fits:
        return row
    prediction = plan.chosen.prediction
    row["predicted_bytes"] = prediction.allocated_bytes if capped.device.type == "cuda" else prediction.peak_bytes
    overhead = sum(constant.bytes for constant in prediction.overheads)
    row |= capped.run(name, tokens, plan.chosen.options, cap_bytes, 3, overhead)
    if not row["fits"]:
        row["problem"] = NOT_BUILT if "built" in row else f"the plan for {format_bytes(cap_bytes)} does not fit"
    return row


def longest_row(plan: Plan) -> tuple[int, MemoryOptions]:
    """Return the tokens of the longest row that is planned to fit, and the memory options for it: those that need
    least."""
    *_, options = first_options(plan.step), *smaller(plan.step)
    return max_tokens(plan), options


def lengths_within(capped: CappedDevice, plan: Plan) -> tuple[MemoryOptions, list[int]]:
    """Return memory options, and with them the longest row that is planned to fit and longer ones; no row if none would
    do.

    Memory options are tried from those that need least memory to the plainest: the less they save, the shorter are rows
    and steps. A row will do if its step is short enough, and the host has room for the longest.
    """
    start = 2 * sum(plan.step.pack.lengths)
    for options in reversed((first_options(plan.step), *smaller(plan.step))):
        job_of = partial(row_job, plan, options)
        try:
            first = longest(job_of, plan.limit_bytes, None, start, MAX_TOKENS)
        except DoesNotFitError:
            continue
        found = [math.ceil(share * first / LENGTH_STEP) * LENGTH_STEP for share in STEPS_ABOVE]  # one more at least
        short = capped.machine.seconds(predict(job_of(first)).simulation.work) <= MAX_STEP_SECONDS
        if short and predict(job_of(found[-1])).fits_host(capped.machine.host_bytes):
            return options, list(dict.fromkeys(found))
    return options, []


def row_job(plan: Plan, options: MemoryOptions, tokens: int) -> Job:
    """Return the plan's job with other memory options for one row of so many tokens, all learned."""
    return replace(plan.step.job, shape=BatchShape((tokens,), tokens - 1), options=options)


def length_rows(capped: CappedDevice, name: str, tokens: int, cap_bytes: int) -> Iterator[dict]:
    """Run the longest sequence that is planned to fit, and longer ones until one fails."""
    row = {"kind": "length", "model": name, "cap_bytes": cap_bytes}
    if cap_bytes > capped.machine.memory_bytes:
        yield row | {"skipped": "the GPU has less free"}
        return
    plan = plan_below(replace(capped.machine, host_bytes=None), name, tokens, cap_bytes)
    options, lengths = lengths_within(capped, plan)
    if not lengths:
        most = f"takes at most {MAX_STEP_SECONDS:.0f} s"
        yield row | {
            "skipped": f"no memory options with which a step of the longest row {most} and the host has room for it"
        }
        return
    row |= {"planned_longest_tokens": lengths[0], "options": options.settings}
    for length in lengths:
        prediction = predict(row_job(plan, options, length))
        row |= {"tokens": length, "above_planned": length / lengths[0] - 1, "planned_bytes": prediction.peak_bytes}
        started = time.perf_counter()
        overhead = sum(constant.bytes for constant in prediction.overheads)
        done = row | capped.run(name, length, options, cap_bytes, 1, overhead)
        done["seconds"] = time.perf_counter() - started
        if length == lengths[0] and not done["fits"]:
            done["problem"] = NOT_BUILT if "built" in done else "the longest sequence that was planned to fit does not"
        elif length == lengths[-1] and done["fits"]:
            done["problem"] = f"no failing length up to {length:,} tokens"
        yield done
        if not done["fits"]:
            return
