"""A run's stages: frozen values, and the functions that make each of the one before.

    prepare -> Prepared -> plan -> Planned -> load -> Loaded -> probe -> Proven -> training.train -> Trained

A stage also holds what the stages before it hold. ``prove`` goes from Prepared to Proven, again where a plan turns out
not to fit. The order is chosen so that what is cheap fails first: the tokenizer, the data, the plan, then the model,
then the memory; nothing is lost if a run is cut off before it is proven. Each function stops a run with a
``QloraLiteError`` that says why. Recipes go no further down than the package ``prepare``.
"""

import gc
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from qlora_lite.adapters.lora.start import First
from qlora_lite.artifacts.run_files import HELD_OUT_DIGEST
from qlora_lite.artifacts.run_folder import (
    TEMPLATE,
    TOKENIZER_DIGEST,
    RunFolder,
    package_versions,
    tokenizer_sha256,
    trained_folders,
)
from qlora_lite.artifacts.trained_run import adapter_to_begin_with, with_labels_of
from qlora_lite.data.chat.template import portable_source
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DoesNotFitError, OutputError, first_line
from qlora_lite.export.merge import loses_its_update
from qlora_lite.files import Space, write_text
from qlora_lite.inference.evaluate import Measured, Watch
from qlora_lite.memory.meter import PeakMeter, mapped_bytes, set_memory_limit
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.kernels import kernels_of, use_kernels
from qlora_lite.models.locate import ModelFiles
from qlora_lite.models.memory_options import divided_weights, on_disk
from qlora_lite.models.packing import runs_unpacked, why_unpacked
from qlora_lite.prepare.datasets import build_stream, held_out_digest, rows_to_plan
from qlora_lite.prepare.early import check_run
from qlora_lite.prepare.first_weights import Ranks, finds_ranks, initial_weights, with_ranks
from qlora_lite.prepare.job import build_workload
from qlora_lite.prepare.model import add_adapter, build_model, build_skeleton, fingerprint
from qlora_lite.prepare.objective import find_objective
from qlora_lite.prepare.plan import Plan, as_measured, expected_peak
from qlora_lite.prepare.preflight import Preflight, line_of_problem, preflight
from qlora_lite.prepare.ranks import plan_run
from qlora_lite.prepare.settings import MICRO_BATCHES, learning_rate
from qlora_lite.prepare.task import find_task, name_labels
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.data_page import write_data_page
from qlora_lite.reporting.plan_text import reason
from qlora_lite.train.guards import frozen_checksum
from qlora_lite.train.inventory import inventory, total_parameters
from qlora_lite.train.loop import StepMetrics, Trainer, largest_batches
from qlora_lite.train.out_of_memory import (
    CURES,
    another_plan_may_help,
    explaining_memory,
    free_cached_memory,
)
from qlora_lite.train.processes import ALONE, Processes
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.state import STATE
from qlora_lite.units import counted, format_bytes, format_count

from .async_checkpoint import check_space
from .resume import BASE_MODEL, Continuation, data_identity, environment
from .signals import Stop

log = logging.getLogger("qlora_lite")
HEADROOM = (0.02, 0.05, 0.1)  # shares of the budget: beside what a memory probe took too much, one plan after the other

Progress = Callable[[StepMetrics, int], None]


@dataclass(frozen=True)
class Prepared:
    """The data are good to train on, and those of the run to resume; nothing of the model is loaded."""

    recipe: Recipe  # with a number for its learning rate
    run: RunFolder
    continuation: Continuation | None  # the checkpoint to resume from
    stop: Stop
    meter: PeakMeter
    progress: Progress | None  # called after every step with its metrics and the total number of steps
    watch: Watch | None
    processes: Processes  # that train together
    tokenizer: PreTrainedTokenizerFast  # or what makes a model's inputs of pictures
    data: Preflight
    rows: Sequence[Example]  # whose largest micro-batch decides what fits
    first_adapter: Path | None  # whose weights training begins with
    first: First | None  # what the LoRA weights begin as, of lora.start eva and qera
    ranks: Ranks | None  # of which each layer is, of eva
    identity: dict  # see ``Continuation.compare_identity``
    kept: Mapping[str, Any]  # of ``prepare.task.Encoded``

    @property
    def eval_examples(self) -> Sequence[Example]:
        """The evaluation rows, none if there is no evaluation."""
        return self.data.eval_data.examples if self.data.eval_data else ()

    @property
    def with_ranks(self) -> Recipe:
        """The recipe with the ranks that layers have."""
        return with_ranks(self.recipe, self.ranks) if self.ranks else self.recipe


@dataclass(frozen=True)
class Planned(Prepared):
    """There is a way to run the step that should fit into the budget."""

    plan: Plan
    settings: TrainSettings
    budget_bytes: int

    @property
    def chosen(self) -> dict[str, object]:
        """The plan's settings by the recipe's keys, as a step of all ranks has them."""
        return self.plan.chosen.settings | {f"train.{name}": getattr(self.settings, name) for name in MICRO_BATCHES}


@dataclass(frozen=True)
class Loaded(Planned):
    """The model is where the plan wants it, and training computes what the model computes."""

    model: nn.Module
    trainer: Trainer
    checksum: str  # of the frozen weights


@dataclass(frozen=True)
class Proven(Loaded):
    """The largest step was run and fits, and so do checkpoints on the disk; kernels and loss are chosen."""

    environment: dict  # see ``resume.environment``


@dataclass(frozen=True)
class Trained(Proven):
    """The best adapter is saved."""

    before: Measured | None
    after: Measured | None
    adapter_step: int  # whose weights the adapter has
    ended_by: str  # the setting that ended training


class Overrun(NamedTuple):
    """What a memory probe took beyond its plan, at least, in bytes, and what happened."""

    bytes: int
    words: str


def prepare(
    recipe: Recipe,
    run: RunFolder,
    continuation: Continuation | None,
    stop: Stop,
    meter: PeakMeter,
    progress: Progress | None,
    watch: Watch | None,
    processes: Processes = ALONE,
) -> Prepared:
    """Read tokenizer and data, and stop where training on them would be a mistake, or another run than before."""
    check_run(recipe)
    if recipe.model.quant != "none" and loses_its_update(recipe.model.path):
        log.warning(
            "model.path is a merged model: in 4 bit it loses much or all of what was merged into it; train "
            "on its base with lora.init_from, or with model.quant none"
        )
    objective = find_objective(recipe)
    code = objective.identity(recipe)
    if continuation:  # before other code than the run's is executed
        continuation.compare_identity(code)
    objective.check(recipe)
    task = find_task(recipe)
    task.locate(recipe)  # stops at once where the model's files are not there
    tokenizer = task.reader(recipe)
    if recipe.train.learning_rate == "auto":
        rate = continuation.learning_rate if continuation else learning_rate(recipe)
        log.info("train.learning_rate: auto is %g", rate)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": rate})})
    # a checkpoint has its own weights, and a reference model those that training began with, as qera's files do
    is_needed = not continuation or build_workload(recipe).objective.needs_reference or continuation.is_of_qera
    first_adapter = adapter_to_begin_with(recipe) if is_needed else None
    if first_adapter:
        begun = with_labels_of(first_adapter, recipe)
        add_adapter(begun, build_skeleton(begun), first_adapter)  # stops at once where it does not fit
        log.info("lora: training begins with the factors of %s", first_adapter)
    found = preflight(recipe, tokenizer)
    if run.proven:
        write_data(run, found)
    found.raise_if_unusable()
    recipe = name_labels(recipe, found.data)
    if first_adapter:
        with_labels_of(first_adapter, recipe)
    template = found.data.template
    if template and template.name != "model":  # for other tools
        tokenizer.chat_template = portable_source(template)
    _log_data(found.report)
    identity = data_identity(recipe, tokenizer, found.data, found.eval_data)
    if continuation:
        continuation.compare_identity(identity)
    parts = (found.data,) if found.eval_data is None else (found.data, found.eval_data)
    encoded = task.encode(recipe, tokenizer, parts, watch)
    recipe, (training, *evaluation) = encoded.recipe, encoded.parts
    found = replace(found, data=training, eval_data=next(iter(evaluation), None))
    rows = rows_to_plan(recipe, found.data)
    written = [run.path / name for name in trained_folders(recipe)] if continuation else ()
    known = continuation.ranks if continuation and finds_ranks(recipe) else None
    first, ranks = initial_weights(recipe, found.data.examples, written, known)
    return Prepared(
        recipe,
        run,
        continuation,
        stop,
        meter,
        progress,
        watch,
        processes,
        tokenizer,
        found,
        rows,
        first_adapter,
        first,
        ranks,
        identity | code,
        encoded.kept,
    )


def prove(prepared: Prepared) -> Proven:
    """Load the model for the fastest plan that a memory probe proves to fit.

    Where a probe takes more than its plan and the budget, the run is planned again with as much and a little more
    headroom, a few times. (A run that resumes has its checkpoint's plan and no other.)
    """
    device, shares = prepared.meter.device, iter(HEADROOM)
    free_cached_memory(device)
    outcome = _of_all(probe(load(planned := plan(prepared))), prepared.processes)
    while isinstance(outcome, Overrun):
        too_much = DoesNotFitError(f"{outcome.words}; {CURES}")
        if (share := next(shares, None)) is None:
            raise too_much
        headroom = outcome.bytes + int(share * planned.budget_bytes)
        log.warning("%s; planning again with %s of headroom", outcome.words, format_bytes(headroom))
        gc.collect()  # the model
        free_cached_memory(device)
        prepared.meter.restart()
        try:
            outcome = _of_all(probe(load(plan(prepared, headroom))), prepared.processes)
        except DoesNotFitError as error:
            raise too_much from error
    has_evaluation, keep = prepared.data.eval_data is not None, prepared.recipe.train.keep_checkpoints
    method, model = outcome.trainer.workload.method, outcome.trainer.model
    written = model.parameters() if method.trains_base else outcome.trainer.parameters
    weights, states = sum(tensor.nbytes for tensor in written), outcome.trainer.optimizer_bytes
    if divided_weights(model):  # of whole weights they are counted for each rank
        states = int(sum(prepared.processes.gather(states)))
    if prepared.processes.is_first:
        check_space(prepared.run.path, Space(weights, states, has_evaluation, keep))
    return outcome


def _of_all(outcome: Proven | Overrun, processes: Processes) -> Proven | Overrun:
    """Return an overrun, the largest, if any of the ranks had one: then all plan again."""
    most = processes.largest(outcome.bytes if isinstance(outcome, Overrun) else -1)
    if most < 0:
        return outcome
    words = outcome.words if isinstance(outcome, Overrun) else "another rank needs more memory than planned"
    return Overrun(int(most), words)


def plan(prepared: Prepared, headroom: int = 0) -> Planned:
    """Choose how to run the step before anything large is loaded, and leave so many bytes of the budget as headroom."""
    earlier, kept, of_ranks = prepared.continuation, None, None
    if earlier and earlier.keeps_plan:
        of_ranks = earlier.plan_of_ranks(prepared.processes.world_size)
        kept = None if of_ranks else earlier.plan_of(prepared.processes.world_size)
    rows = prepared.rows, prepared.eval_examples
    found, settings = plan_run(prepared.with_ranks, *rows, headroom, prepared.processes, of_ranks, kept)
    log.info("plan: %s", reason(found))
    return Planned(**vars(prepared), plan=found, settings=settings, budget_bytes=found.budget_bytes + headroom)


def load(planned: Planned) -> Loaded:
    """Load the model as planned, make its trainer, and stop where either is not that of the run to resume."""
    recipe, continuation = planned.recipe, planned.continuation
    ran_out = explaining_memory(
        "close other programs, or choose a smaller model", "memory ran out while the model was loaded"
    )
    with ran_out, planned.processes.one_ahead():
        options, shards = planned.settings.options, planned.processes.shards
        model = build_model(planned.with_ranks, options, planned.first_adapter, planned.first, shards)
    work = find_task(recipe).ready(
        planned.plan.step.job.workload, recipe, planned.tokenizer, planned.rows, planned.data.data.end_token_ids
    )
    stream = build_stream(recipe, planned.tokenizer)
    trainer = Trainer(model, planned.rows, planned.settings, stream, work, planned.processes)
    trainer.check()
    if not continuation and not planned.first_adapter:
        work.method.begin(model)
    if runs_unpacked(model) and not why_unpacked(model, recipe.data.max_tokens):
        log.warning(
            "the plan, and the peak that it predicts, is of packed sequences, but the loaded model shows "
            "that it cannot have them: the next step measures what it takes"
        )
    if continuation:
        trainer.most_tokens = continuation.checkpoint.documents[STATE]["most_tokens"]
    files = find_task(recipe).locate(recipe)
    base = fingerprint(recipe, files)
    identity = {
        BASE_MODEL: base,
        "type of device": device_of(model).type,
        "compute type": str(model.dtype).removeprefix("torch."),
    }
    known = vars(planned) | {"identity": planned.identity | identity}
    checksum = frozen_checksum(model, trainer.workload.method.trained_base(model))
    alike = known["identity"] | {"weights": checksum, "versions": package_versions(), "lora ranks": planned.ranks}
    planned.processes.require_equal("data, base weights or versions", json.dumps(alike, sort_keys=True, default=str))
    loaded = Loaded(**known, model=model, trainer=trainer, checksum=checksum)
    _describe_model(loaded, base, files)
    if continuation:
        continuation.compare_identity(identity)
        if recipe.train.max_steps is None:  # what only the rows tell
            continuation.compare_schedule(trainer.total_steps, planned.settings)
    return loaded


def probe(loaded: Loaded) -> Proven | Overrun:
    """Run the largest micro-batch and evaluation batch once; compare with the budget, and write down what fits."""
    trainer, budget, device = loaded.trainer, loaded.budget_bytes, device_of(loaded.model)
    earlier = loaded.continuation
    free_cached_memory(device)  # of loading
    set_memory_limit(device, budget)
    batches = largest_batches(trainer.workload, loaded.rows, loaded.eval_examples, trainer.epochs, trainer.most_tokens)
    expected = expected_peak(loaded.plan, *batches)
    # what is trained, now or in a later turn, is written to, so that no file page stands for it any more
    parameters = () if trainer.workload.method.trains_base else loaded.model.parameters()
    weights = [*(each for each in parameters if not each.requires_grad), *loaded.model.buffers()]
    planned = [each for each in weights if not on_disk(loaded.model, each)]
    mapped = mapped_bytes(planned) if device.type == "cpu" else 0
    predicted = as_measured(loaded.plan, expected) - mapped
    if loaded.settings.options.compile:
        log.info("train.compile: compiling the blocks, which takes a minute or so the first time")
    try:
        before = earlier.run["environment"] if earlier and earlier.keeps_plan else {}
        _choose(loaded, before.get("kernels"), before.get("loss"))
        trainer.probe_memory(loaded.eval_examples)
    except (RuntimeError, MemoryError) as error:
        if not another_plan_may_help(error, device):
            raise
        words = (
            f"memory ran out over the largest micro-batch, predicted {format_bytes(predicted)} ({first_line(error)})"
        )
        if trainer.is_sharded:  # if it has not on the others, they wait for this one, and end
            log.warning(words)
        return Overrun(budget - loaded.plan.peak_bytes, words)
    peak = trainer.meter.peak_bytes()  # without what loading took for a moment
    later = loaded.plan.chosen.prediction.later_bytes
    place = expected.simulation.peak()
    log.info(
        "memory: the largest micro-batch peaks at %s (predicted %s, %s of %s); budget %s",
        format_bytes(peak),
        format_bytes(predicted),
        place.phase,
        place.module or "the loss",
        format_bytes(budget),
    )
    if peak + later > budget:
        beside = f" and a checkpoint's copy and later kernels take {format_bytes(later)}" if later else ""
        words = f"the largest micro-batch peaks at {format_bytes(peak)}{beside}, over the budget of "
        return Overrun(peak + later - loaded.plan.peak_bytes, words + format_bytes(budget))
    loss = trainer.workload.objective.name
    kernels = sorted(kernels_of(loaded.model)) if device.type == "cuda" else []
    loaded.run.update(
        plan={
            "budget_bytes": budget,
            "predicted_peak_bytes": predicted,
            "measured_peak_bytes": peak,
            "chosen": loaded.chosen,
            "why": reason(loaded.plan),
            "loss": loss,
            "kernels": kernels,
        }
    )
    now = environment(_device_name(device), loss, kernels, loaded.checksum, loaded.processes.world_size)
    return Proven(**vars(loaded), environment=now)


def _choose(loaded: Loaded, kernels: list[str] | None, loss: str | None) -> None:
    """Choose kernels and loss, as recorded where they are given; the first rank's choice is that of all.

    Ranks that get weights from each other have to try them together.
    """
    trainer, processes, told = loaded.trainer, loaded.processes, "[null, null]"
    if trainer.is_sharded:
        trainer.choose_kernels(kernels)
        trainer.choose_loss(loss)
        kernels, loss = json.loads(processes.tell(_chosen(trainer)))
        use_kernels(loaded.model, kernels)
        trainer.choose_loss(loss)
        return
    if not processes.is_first:
        kernels, loss = json.loads(processes.tell(told))
    try:
        trainer.choose_kernels(kernels)
        trainer.choose_loss(loss)
        told = _chosen(trainer)
    finally:
        if processes.is_first:
            processes.tell(told)


def _chosen(trainer: Trainer) -> str:
    return json.dumps([sorted(kernels_of(trainer.model)), trainer.workload.objective.name])


def _log_data(report: dict) -> None:
    for problem in report["problems"]:
        log.warning("data: %s", line_of_problem(problem))
    sources = [*report["sources"], *(report["eval"] or {"sources": []})["sources"]]
    for path, note in dict.fromkeys((source["path"], note) for source in sources for note in source["notes"]):
        log.info("data: %s: %s", path, note)
    left_out = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
    efficiency = report["packing_efficiency"]
    tokens = f", {report['tokens']} tokens, {report['target_tokens']} of them targets" if report["tokens"] else ""
    log.info(
        "data: %d of %d rows%s%s%s",
        report["rows_kept"],
        report["rows_read"],
        tokens,
        f", left out: {left_out}" if left_out else "",
        f", {report['packs']} packs {efficiency:.0%} full" if efficiency else "",
    )


def write_data(run: RunFolder, found: Preflight) -> None:
    """Write down what the rows are, and the template for generate, chat and evaluate."""
    data, report = found.data, found.report
    try:
        write_text(run.path / "data.json", json.dumps(report, indent=2) + "\n")
        write_data_page(report, run.path / "data.html", run.recipe.output.name)
    except OutputError as error:  # for a person to look at, and `qlora-lite data` shows the same
        log.warning("%s. The run continues without it", error)
    if data.template:
        write_text(run.path / TEMPLATE, portable_source(data.template))
    counts = ("rows_read", "rows_kept", "dropped", "tokens", "target_tokens", "packing_efficiency")
    counted = {key: report[key] for key in counts} | {"end_token_ids": sorted(data.end_token_ids)}
    if run.recipe.data.eval_share and found.eval_data:  # of a run that is resumed, what it first held out
        known = run.summary.get("data", {}).get(HELD_OUT_DIGEST)
        counted[HELD_OUT_DIGEST] = known or held_out_digest(found.eval_data)
    run.update(data=counted)


def _describe_model(loaded: Loaded, base: str, files: ModelFiles) -> None:
    table = inventory(loaded.trainer.workload, loaded.model)
    method = loaded.trainer.workload.method
    at_a_time = sum(parameter.numel() for _, parameter in method.parameters(loaded.model))
    trainable = sum(each.numel() for each in method.trained_base(loaded.model)) if method.in_turn else at_a_time
    for entry in table:
        log.info(
            "memory: %-26s %-9s %-6s %10s  %s",
            entry.group,
            entry.dtype,
            entry.device,
            format_bytes(entry.bytes),
            entry.why,
        )
    total = total_parameters(loaded.model, loaded.trainer.workload.method)
    log.info(
        "model: %s weights, %s trainable%s",
        format_count(total),
        format_count(trainable),
        f", {format_count(at_a_time)} at a time" if method.in_turn else "",
    )
    changing = {  # results, in exchange for memory or time
        "model.quant_head: the head is in 4 bit, which is another model than the one with its 16-bit head; losses and "
        "answers differ": loaded.recipe.model.quant_head,
        "train.compile: results differ by rounding from those of a run without it": loaded.recipe.train.compile,
    }
    loaded.run.update(
        device=_device_name(device_of(loaded.model)),
        trainable_parameters=trainable,
        memory_table=[asdict(entry) for entry in table],
        versions=package_versions(),
        base_fingerprint=base,
        **{TOKENIZER_DIGEST: None if files.gguf_file else tokenizer_sha256(files.folder)},
        other_results=[what for what, is_set in changing.items() if is_set],
        learning_rate=loaded.settings.learning_rate,
        **find_task(loaded.recipe).summary(loaded.recipe, loaded.tokenizer),
        **({"lora_ranks": loaded.ranks} if loaded.ranks else {}),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"
