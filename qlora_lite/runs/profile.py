"""Run real steps of a recipe under the ledger, and write what used the memory and the time.

The result is one page and one JSON file beside it, also when the device runs out of memory on the way: then they show
the state at the failure. On CUDA the allocator's own history is written too, for PyTorch's memory viewer.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from qlora_lite.artifacts.trained_run import adapter_to_begin_with, with_labels_of
from qlora_lite.errors import DoesNotFitError, first_line
from qlora_lite.files import explain_write_errors, write_text
from qlora_lite.memory.ledger import Ledger, Moment
from qlora_lite.memory.marks import timing
from qlora_lite.memory.meter import PeakMeter, set_memory_limit
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.kernels import kernels_of, use_kernels
from qlora_lite.models.memory_options import set_memory_options
from qlora_lite.offload.own_blocks import OwnBlocks
from qlora_lite.planning.plan_ledger import ALLOCATION_BYTES
from qlora_lite.planning.predict import Prediction
from qlora_lite.prepare.datasets import build_data, build_stream, rows_to_plan
from qlora_lite.prepare.first_weights import initial_weights, with_ranks
from qlora_lite.prepare.model import build_model
from qlora_lite.prepare.plan import Plan, alternatives, as_measured, expected_peak
from qlora_lite.prepare.ranks import plan_run
from qlora_lite.prepare.task import find_task, name_labels
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.memory_page import memory_page
from qlora_lite.reporting.plan_text import constants, reason
from qlora_lite.train.determinism import deterministic
from qlora_lite.train.inventory import categorised
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.out_of_memory import is_out_of_memory
from qlora_lite.units import format_bytes, format_seconds

log = logging.getLogger("qlora_lite")
ALLOCATOR_EVENTS = 100_000


@dataclass(frozen=True, slots=True)
class Profile:
    """Where a profile was written, and its figures (see ``memory.json``)."""

    page: Path
    figures: dict


def profile_recipe(recipe: Recipe, out: Path, steps: int) -> Profile:
    """Run steps of a recipe, the last of them under the ledger, and write ``memory.html`` and ``memory.json``.

    Args:
        out: folder to write into; made if it is not there.
        steps: optimizer steps, at least 1; all but the last are timed without the ledger.

    Raises:
        DoesNotFitError: the plan does not fit, or the device ran out of memory; in the second case the page shows the
            state at the failure.
        OutputError: the folder cannot be written.
    """
    task = find_task(recipe)
    tokenizer = task.reader(recipe)
    data, eval_data = build_data(recipe, tokenizer, compares=True), build_data(recipe, tokenizer, "eval", compares=True)
    recipe = name_labels(recipe, data)
    encoded = task.encode(recipe, tokenizer, [data, *([eval_data] if eval_data else [])])
    recipe, (data, *others) = encoded.recipe, encoded.parts
    eval_examples = others[0].examples if others else ()
    first_adapter = adapter_to_begin_with(recipe)
    if first_adapter:
        with_labels_of(first_adapter, recipe)
    first, ranks = initial_weights(recipe, data.examples)
    if ranks:
        recipe = with_ranks(recipe, ranks)
    rows = rows_to_plan(recipe, data)
    with deterministic(recipe.train.deterministic):  # before the plan, which times the device's first product
        plan, settings = plan_run(recipe, rows, eval_examples)
        log.info("plan: %s", reason(plan))
        with explain_write_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        model = build_model(recipe, settings.options, first_adapter, first)
        work = task.ready(plan.step.job.workload, recipe, tokenizer, rows, data.end_token_ids)
        trainer = Trainer(model, rows, settings, build_stream(recipe, tokenizer), work)
        trainer.check()
        largest = largest_batches(work, rows, eval_examples, trainer.epochs)
        expected = expected_peak(plan, *largest)
        device = device_of(model)
        set_memory_limit(device, plan.budget_bytes)
        ledger = Ledger(timeline=True, allocation_bytes=ALLOCATION_BYTES[device.type])
        with PeakMeter(device) as meter, _allocator_history(device, out):
            trainer.choose_kernels()
            trainer.choose_loss()
            seconds = _timed_steps(trainer, steps - 1) if steps > 1 else {}
            failure = _ledgered(trainer, ledger, model, eval_examples)
            process = meter.peak_bytes()
    figures = _figures(plan, expected, ledger, seconds, process, failure)
    page = out / "memory.html"
    write_text(out / "memory.json", json.dumps(figures, indent=2) + "\n")
    write_text(page, memory_page(_record(plan, expected, ledger, figures, recipe.output.name or "qlora-lite")))
    if failure:
        raise DoesNotFitError(f"the device ran out of memory: {failure}; {page} shows what held it")
    return Profile(page, figures)


def _timed_steps(trainer: Trainer, steps: int) -> dict[str, float]:
    """Train without the ledger; return the mean seconds of each phase of a step."""
    with timing(device_of(trainer.model)) as seconds:
        taken = sum(1 for _ in islice(trainer, steps))
    return {name: value / taken for name, value in seconds.items()}


def _ledgered(trainer: Trainer, ledger: Ledger, model, eval_examples) -> str:
    """Probe the largest step under the ledger; return the device's words if it ran out of memory.

    The ledger cannot see into compiled blocks, so it sees them uncompiled.
    """
    kernels = kernels_of(model)
    blocks = trainer.workload.spec.blocks(model) if isinstance(model, OwnBlocks) else None
    set_memory_options(model, replace(trainer.settings.options, compile=False), blocks)
    use_kernels(model, kernels)
    with ledger:
        for tensor, category, _ in categorised(trainer.workload, model):
            ledger.claim([tensor], category)
        ledger.watch(model)
        try:
            trainer.probe_memory(eval_examples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return first_line(error)
    return ""


@contextmanager
def _allocator_history(device: torch.device, out: Path) -> Iterator[None]:
    """Record CUDA's allocations while inside, and leave the snapshot that PyTorch's viewer opens."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=ALLOCATOR_EVENTS)  # its name
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(out / "memory_snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


def _figures(plan: Plan, expected: Prediction, ledger: Ledger, seconds, process_bytes: int, failure: str) -> dict:
    planned = expected.simulation.peak()
    return {
        "peak_bytes": ledger.peak.total,
        "peak_phase": ledger.peak.phase,
        "peak_module": ledger.peak.module,
        "measured": ledger.peak.breakdown,
        "predicted": planned.breakdown,
        "predicted_peak_bytes": planned.total,
        "by_phase": {
            phase: max((m.total for m in ledger.peaks.values() if m.phase == phase), default=0)
            for phase in ("forward", "backward", "optimizer", "evaluation")
        },
        "process_peak_bytes": process_bytes,
        "budget_bytes": plan.budget_bytes,
        "predicted_process_bytes": as_measured(plan, expected),
        "seconds_by_phase": seconds,
        "chosen": plan.chosen.settings,
        "why": reason(plan),
        "out_of_memory": failure or None,
    }


def _beside(plan: Plan, figures: dict) -> list[dict]:
    """Return what was needed beside the tensors: on a CPU what was measured, on a GPU the plan's constants."""
    if plan.machine.device_type == "cuda":  # its counter sees tensors only
        return constants(plan)
    size = max(0, figures["process_peak_bytes"] - figures["peak_bytes"])
    return [{"name": "process", "bytes": size, "why": "Python, its libraries and buffers, measured"}]


def in_words(peak: Moment) -> str:
    """Say where the peak stood and what held it."""
    parts = sorted(peak.on_device.items(), key=lambda item: -item[1])[:4]
    shares = ", ".join(f"{name} {100 * size / max(1, peak.total):.0f} %" for name, size in parts)
    return f"peak in {peak.phase}, {peak.module or 'outside of modules'}: {format_bytes(peak.total)} ({shares})"


def _record(plan: Plan, expected: Prediction, ledger: Ledger, figures: dict, name: str) -> dict:
    others = list(alternatives(plan))
    sentences = [in_words(ledger.peak)]
    saving = [a for a in others if a.peak_bytes < plan.peak_bytes]
    sentences += [
        f"{a.change} saves {format_bytes(plan.peak_bytes - a.peak_bytes)}, at {format_seconds(a.step_seconds)} instead "
        f"of {format_seconds(plan.chosen.step_seconds)} a step by estimate"
        for a in saving[:3]
    ]
    total = sum(figures["seconds_by_phase"].values())
    if total:
        shares = ", ".join(f"{n} {100 * s / total:.0f} %" for n, s in figures["seconds_by_phase"].items())
        sentences.append(f"a step takes {format_seconds(total)}: {shares}")
    if plan.chosen.options.compile:
        sentences.append("tensors were measured with uncompiled blocks: the ledger cannot see into compiled ones")
    if figures["out_of_memory"]:
        sentences.insert(0, f"the device ran out of memory: {figures['out_of_memory']}")
    peak = ledger.peak
    return {
        "title": f"Memory of {name}",
        "subtitle": f"One measured step on {plan.machine.name}",
        "budget_bytes": plan.budget_bytes,
        "peak": {"bytes": peak.total, "phase": peak.phase, "module": peak.module, "breakdown": peak.on_device},
        "timeline": [{"phase": m.phase, "module": m.module, "bytes": m.on_device} for m in ledger.timeline or ()],
        "sentences": sentences,
        "predicted": expected.simulation.peak().on_device,
        "measured": peak.on_device,
        "constants": _beside(plan, figures),
        "alternatives": [asdict(a) for a in others],
    }
