"""From a recipe to a trained adapter: the one place where all parts meet.

Recipes go no further down than ``prepare``; what lies below takes plain arguments. The order is chosen so
that what is cheap fails first: the run folder, the tokenizer, the data, then the model, then the memory, then the
training.
"""

import gc
import json
import logging
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from qlora_lite.artifacts.run_files import METRICS_DIGEST
from qlora_lite.artifacts.run_folder import (
    ADAPTER,
    COMPLETE,
    LOG,
    TEMPLATE,
    RunFolder,
    create_run,
    how_to_go_on,
    is_begun,
    is_complete,
    logging_to,
    new_path,
    newest_checkpoint,
    package_versions,
    rewind_run,
    undo_start,
)
from qlora_lite.artifacts.trained_run import adapter_to_begin_with
from qlora_lite.data.render import last_turn
from qlora_lite.data.template import portable_source
from qlora_lite.errors import CheckpointError, DoesNotFitError, Interrupted, OutputError, QloraLiteError
from qlora_lite.export.merge import loses_its_update
from qlora_lite.files import Space, locked, write_text
from qlora_lite.inference.evaluate import ExactMatch, Watch
from qlora_lite.memory.meter import PeakMeter, hold_to, mapped_bytes
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.cache import base_fingerprint
from qlora_lite.models.kernels import kernels_of
from qlora_lite.models.load import resolve_device
from qlora_lite.models.locate import locate
from qlora_lite.models.rows_alone import rows_run_alone, why_rows_run_alone
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.build import add_factors, build_model, build_skeleton, with_plan
from qlora_lite.prepare.datasets import build_stream, rows_to_plan
from qlora_lite.prepare.plan import as_metered, expected_peak, plan_run
from qlora_lite.prepare.preflight import line_of_problem, preflight
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.data_page import write_data_page
from qlora_lite.reporting.plan_text import reason
from qlora_lite.reporting.report import write_report
from qlora_lite.train.determinism import deterministic
from qlora_lite.train.guards import check_frozen, frozen_checksum
from qlora_lite.train.inventory import inventory, total_parameters
from qlora_lite.train.loop import Trainer, largest_batches
from qlora_lite.train.out_of_memory import (
    CURES,
    another_plan_may_help,
    explaining_memory,
    first_line,
    free_cached_memory,
)
from qlora_lite.train.shared_cores import sharing_cores
from qlora_lite.train.state import STATE
from qlora_lite.units import format_bytes, format_count, format_seconds

from .async_checkpoint import check_space
from .ranks import require_one_process
from .resume import BASE_MODEL, Continuation, data_identity, environment, path_to_continue, reopen
from .signals import Stop, stop_signals
from .tracking import check_trackers
from .training import Progress, Training

log = logging.getLogger("qlora_lite")
SAMPLES = 4
LEFT_FREE = (0.02, 0.05, 0.1)  # of the budget: beside what a rehearsal took too much, one plan after the other


def run_recipe(
    recipe: Recipe, progress: Progress | None = None, resume: str | Path | None = None, force: bool = False,
    watch: Watch | None = None,
) -> Path:  # fmt: skip
    """Run a recipe to its end; return the run folder.

    Args:
        progress: called after every step with its metrics and the total number of steps.
        resume: run folder to go on with, from its newest whole checkpoint; "" takes the recipe's newest run, None
            begins a new one. A run without a checkpoint begins afresh.
        force: go on although the recipe or the data make another run of it.
        watch: called with what is being done ("evaluation" or "exact match"), how many examples are done, and of how
            many.

    Raises:
        QloraLiteError: see its subclasses; the summary then says "failed" or "interrupted", if the folder is kept.
    """
    require_recipe(recipe)
    require_one_process()
    path = None if resume is None else path_to_continue(recipe, resume)
    was_there = path is not None or (bool(recipe.output.dir) and Path(recipe.output.dir).exists())
    is_new, path = path is None, path or new_path(recipe)
    with locked(path):
        begins, was_empty = is_new or not is_begun(path), not any(path.iterdir())
        run, continuation = create_run(path, recipe, replace=not is_new) if begins else None, None
        with logging_to(path / LOG), stop_signals(recipe.train.max_hours) as stop:
            if run is None and is_complete(path, recipe):
                log.info("resume: %s is complete", path)
                return path
            if run is None:
                run, continuation = reopen(path, recipe, force)
            running = _Run(recipe, run, progress, stop, continuation, watch)
            try:
                _execute(running)
            except QloraLiteError as error:
                took_steps = running.training is not None and running.training.is_begun
                if was_empty and not took_steps and not isinstance(error, Interrupted):  # the error says it all
                    undo_start(path, was_there)
                raise
    return path


def _execute(running: "_Run") -> None:
    """Run to the end, or leave a summary and a report that say how far it came and why no further."""
    try:
        running.execute()
    except KeyboardInterrupt as cut:  # before training, or by a second signal
        there = newest_checkpoint(running.newest_step)
        error = Interrupted(f"stopped at once by {str(cut) or 'SIGINT'}; {there}. {how_to_go_on(running.run.path)}")
        running.leave(error)
        raise error from None
    except QloraLiteError as error:
        running.leave(error)
        raise
    finally:
        if running.run.summary.get("status") == "running":  # what nobody foresaw
            running.leave(sys.exception())


class Excess(NamedTuple):
    """What a rehearsal took beyond its plan, at least, in bytes, and what happened."""

    bytes: int
    words: str


class _Run:
    """One execution of a recipe: the state that its stages share."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, progress: Progress | None, stop: Stop, continuation: Continuation | None,
        watch: Watch | None,
    ):  # fmt: skip
        self.recipe, self.run, self.progress, self.stop, self.watch = recipe, run, progress, stop, watch
        self.continuation = continuation
        self.training: Training | None = None
        self.first_adapter: Path | None = None

    def execute(self) -> None:
        """Go through the stages."""
        device = resolve_device(self.recipe.model.device)
        repeatable = deterministic(self.recipe.train.deterministic)
        with repeatable, sharing_cores(device.type), PeakMeter(device) as meter:
            with self.stop.at_once(), explaining_memory():
                self._prepare(meter)
            with explaining_memory():
                after = self.training.go(self.continuation and self.continuation.checkpoint.step)
            check_frozen(self.model, self.checksum)
            self._conclude(self.training.before, after)

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint known to be whole."""
        if self.training and self.training.saver:
            return self.training.saver.newest_step
        return self.continuation and self.continuation.checkpoint.step

    def _prepare(self, meter: PeakMeter) -> None:
        """Do all that comes before the first step; nothing of it is lost if it is cut off."""
        recipe, self.meter = self.recipe, meter
        check_trackers(recipe.train.trackers)
        if recipe.model.quant != "none" and loses_its_update(recipe.model.path):
            log.warning("model.path is a merged model: in 4 bit it loses much or all of what was merged into it; train "
                        "on its base with lora.init_from, or with model.quant none")  # fmt: skip
        self.tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
        self._find_first_adapter()
        self._look_at_data()
        identity = data_identity(recipe, self.tokenizer, self.data, self.eval_data)
        self._compare(identity)
        self.rows = rows_to_plan(recipe, self.data)
        self._load_for_a_proven_plan()
        factors = sum(parameter.nbytes for parameter in self.trainer.parameters)
        has_evaluation, keep = self.eval_data is not None, recipe.train.keep_checkpoints
        check_space(self.run.path, Space(factors, self.trainer.optimizer_bytes, has_evaluation, keep))
        about = {
            "recipe": recipe.model_dump(mode="json"), "identity": identity | self._model_identity(),
            "plan": self.plan.chosen.settings,
            "environment": environment(
                _device_name(device_of(self.model)), self._loss(), self._kernels(), self.checksum
            ),
        }  # fmt: skip
        self.training = Training(recipe, self.run, self.trainer, self.tokenizer, self.eval_data, self.meter, self.stop,
                                 about, self.budget_bytes, self.progress, self.watch)  # fmt: skip
        if self.continuation:
            self._restore(about["environment"])

    def _load_for_a_proven_plan(self) -> None:
        """Load the model for the fastest plan that a rehearsal proves to fit.

        Where a rehearsal takes more than its plan and the budget, it is planned again with as much and a little more
        left free, a few times. (A run that goes on has its checkpoint's plan and no other.)

        Raises:
            DoesNotFitError: nothing fits.
        """
        free_cached_memory(self.meter.device)
        self._plan()
        self._load()
        shares = iter(LEFT_FREE)
        while excess := self._rehearse():
            too_much = DoesNotFitError(f"{excess.words}; {CURES}")
            if (share := next(shares, None)) is None:
                raise too_much
            left_free = excess.bytes + int(share * self.budget_bytes)
            log.warning("%s; planning again with %s left free", excess.words, format_bytes(left_free))
            self._drop_model()
            try:
                self._plan(left_free)
                self._load()
            except DoesNotFitError as error:
                raise too_much from error

    def _drop_model(self) -> None:
        self.model = self.trainer = None
        gc.collect()
        free_cached_memory(self.meter.device)
        self.meter.restart()

    def _load(self) -> None:
        """Load the model as planned, make its trainer, and stop where either is not that of a run to go on with."""
        with explaining_memory("close other programs, or choose a smaller model",
                               "memory ran out while the model was loaded"):  # fmt: skip
            self.model = build_model(self.recipe, self.settings.levers, self.first_adapter)
        stream = build_stream(self.recipe, self.tokenizer)
        self.trainer = Trainer(self.model, self.rows, self.settings, stream, self.plan.step.job.workload)
        self.trainer.check()
        if rows_run_alone(self.model) and not why_rows_run_alone(self.model, self.recipe.data.max_tokens):
            log.warning("the plan is one of packed sequences, since nothing but the loaded model shows that it cannot "
                        "have them: whether it fits is for the next step to prove")  # fmt: skip
        if self.continuation:
            self.trainer.most_tokens = self.continuation.checkpoint.documents[STATE]["most_tokens"]
        self.fingerprint = base_fingerprint(locate(self.recipe.model.path, self.recipe.model.revision))
        self._describe_model()
        self.checksum = frozen_checksum(self.model)
        self._compare(self._model_identity())
        if self.continuation and self.recipe.train.max_steps is None:  # what only the rows tell
            self.continuation.compare_schedule(self.trainer.total_steps, self.settings)

    def _model_identity(self) -> dict:
        return {
            BASE_MODEL: self.fingerprint, "type of device": device_of(self.model).type,
            "compute type": str(self.model.dtype).removeprefix("torch."),
        }  # fmt: skip

    def _compare(self, identity: dict) -> None:
        if self.continuation:
            self.continuation.compare_identity(identity)

    def _restore(self, now: dict) -> None:
        """Put everything back to where the checkpoint was made, and write down what is different."""
        self.continuation.say_changes(now)
        self.training.restore(self.continuation)
        self.run.proven = True
        has_best = self.training.best_factors is not None
        rewind_run(self.run, has_best, self.continuation.run.get(METRICS_DIGEST))
        self._write_data()
        part = {"after_step": self.trainer.step, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "changes": self.continuation.accepted, "forced_changes": self.continuation.forced}  # fmt: skip
        self.run.update(status="running", resumed=[*self.run.summary.get("resumed", []), part])

    def leave(self, error: BaseException) -> None:
        """Write down why the run ended early, if the disk lets us; a run that was not gone on with stays as it was."""
        if not self.run.proven:
            return
        can_go_on = isinstance(error, Interrupted | CheckpointError)
        why = str(error) if isinstance(error, QloraLiteError) else repr(error)
        try:
            self.run.summary.update(**self.figures(), status="interrupted" if can_go_on else "failed", error=why)
            self.run.write_summary()
            write_report(self.run.path)
        except OutputError as fault:
            log.warning("%s", fault)

    def figures(self) -> dict:
        """Return what the summary says of the steps so far."""
        if self.training is None:
            return {}
        totals = self.training.totals
        speed = totals["tokens"] / totals["seconds"] if totals["steps"] else None
        skipped = {"skipped_steps": self.trainer.skipped}
        return totals | skipped | self.training.digests | {
            "tokens_per_second": speed, "peak_bytes": self.training.peak_bytes,
            METRICS_DIGEST: self.run.metrics_hash.hexdigest(),
        }  # fmt: skip

    def _find_first_adapter(self) -> None:
        """Find what lora.init_from names, and stop at once where it does not fit model and recipe.

        (A run that goes on has its checkpoint's factors and no others.)
        """
        self.first_adapter = None if self.continuation else adapter_to_begin_with(self.recipe)
        if self.first_adapter:
            add_factors(self.recipe, build_skeleton(self.recipe), self.first_adapter)
            log.info("lora: training begins with the factors of %s", self.first_adapter)

    def _look_at_data(self) -> None:
        """Read the rows, write down what they are, and stop where training on them would be a mistake."""
        found = preflight(self.recipe, self.tokenizer)
        self.data, self.eval_data, self.data_report = found.data, found.eval_data, found.report
        if self.run.proven:
            self._write_data()
        found.raise_if_unusable()
        if self.data.template and self.data.template.name != "model":  # for other tools
            self.tokenizer.chat_template = portable_source(self.data.template)
        report = self.data_report
        for problem in report["problems"]:
            log.warning("data: %s", line_of_problem(problem))
        sources = [*report["sources"], *(report["eval"] or {"sources": []})["sources"]]
        for path, note in dict.fromkeys((source["path"], note) for source in sources for note in source["notes"]):
            log.info("data: %s: %s", path, note)
        left_out = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
        efficiency = report["packing_efficiency"]
        log.info(
            "data: %d of %d rows, %d tokens, %d learned%s%s", report["rows_kept"], report["rows_read"],
            report["tokens"], report["learned_tokens"], f", left out: {left_out}" if left_out else "",
            f", {report['packs']} packs {efficiency:.0%} full" if efficiency else "",
        )  # fmt: skip

    def _write_data(self) -> None:
        """Write down what the rows are, and the template for generate, chat and evaluate."""
        path, report = self.run.path, self.data_report
        try:
            write_text(path / "data.json", json.dumps(report, indent=2) + "\n")
            write_data_page(report, path / "data.html", self.recipe.output.name)
        except OutputError as error:  # for a person to look at, and `qlora-lite data` shows the same
            log.warning("%s. The run goes on without it", error)
        if self.data.template:
            write_text(path / TEMPLATE, portable_source(self.data.template))
        counts = ("rows_read", "rows_kept", "dropped", "tokens", "learned_tokens", "packing_efficiency")
        self.run.update(data={key: report[key] for key in counts} | {"end_token_ids": sorted(self.data.end_token_ids)})

    def _describe_model(self) -> None:
        table = inventory(self.trainer.workload, self.model)
        trainable = sum(parameter.numel() for parameter in self.trainer.parameters)
        for entry in table:
            log.info("memory: %-26s %-9s %-6s %10s  %s", entry.group, entry.dtype, entry.device,
                     format_bytes(entry.bytes), entry.why)  # fmt: skip
        log.info("model: %s weights, %s trainable", format_count(total_parameters(self.model)),
                 format_count(trainable))  # fmt: skip
        self.run.update(
            device=_device_name(device_of(self.model)), trainable_parameters=trainable,
            memory_table=[asdict(entry) for entry in table], other_results=_other_results(self.recipe),
            versions=package_versions(), base_fingerprint=self.fingerprint,
        )  # fmt: skip

    @property
    def _keeps_plan(self) -> bool:
        return self.continuation is not None and self.continuation.keeps_plan

    def _plan(self, left_free: int = 0) -> None:
        """Choose how to run the step before anything large is loaded; what cannot fit ends the run here.

        Args:
            left_free: bytes of the budget that no plan may use.
        """
        eval_examples = self.eval_data.examples if self.eval_data else ()
        recipe = with_plan(self.recipe, self.continuation.run["plan"]) if self._keeps_plan else self.recipe
        self.plan, self.settings = plan_run(recipe, self.rows, eval_examples, left_free)
        self.budget_bytes = self.plan.budget_bytes + left_free
        log.info("plan: %s", reason(self.plan))

    def _rehearse(self) -> Excess | None:
        """Run the largest micro-batch and evaluation batch once; compare with the budget, and write down what fits."""
        budget, device = self.budget_bytes, device_of(self.model)
        free_cached_memory(device)  # of loading
        hold_to(device, budget)
        eval_examples = self.eval_data.examples if self.eval_data else ()
        batches = largest_batches(
            self.trainer.workload, self.rows, eval_examples, self.trainer.epochs, self.trainer.most_tokens
        )
        expected = expected_peak(self.plan, *batches)
        weights = (*self.model.parameters(), *self.model.buffers())
        mapped = mapped_bytes(weights) if device.type == "cpu" else 0
        predicted = as_metered(self.plan, expected) - mapped
        if self.settings.levers.compile:
            log.info("train.compile: compiling the blocks, which takes a minute or so the first time")
        try:
            before = self.continuation.run["environment"] if self._keeps_plan else {}
            self.trainer.choose_kernels(before.get("kernels"))
            self.trainer.choose_loss(before.get("loss"))
            self.trainer.rehearse(eval_examples)
        except (RuntimeError, MemoryError) as error:
            if not another_plan_may_help(error, device):
                raise
            words = f"memory ran out over the largest micro-batch, predicted {format_bytes(predicted)}"
            return Excess(budget - self.plan.peak_bytes, f"{words} ({first_line(error)})")
        peak = self.trainer.meter.peak_bytes()  # without what loading took for a moment
        saving = self.plan.chosen.prediction.saving_bytes
        place = expected.simulation.peak()
        log.info("memory: the largest micro-batch peaks at %s (predicted %s, %s of %s); budget %s", format_bytes(peak),
                 format_bytes(predicted), place.phase, place.module or "the loss", format_bytes(budget))  # fmt: skip
        if peak + saving > budget:
            beside = f" and a checkpoint's copy takes {format_bytes(saving)}" if saving else ""
            words = f"the largest micro-batch peaks at {format_bytes(peak)}{beside}, over the budget of "
            return Excess(peak + saving - self.plan.peak_bytes, words + format_bytes(budget))
        self.run.update(plan={
            "budget_bytes": budget, "predicted_peak_bytes": predicted, "measured_peak_bytes": peak,
            "chosen": self.plan.chosen.settings, "why": reason(self.plan), "loss": self._loss(),
            "kernels": self._kernels(),
        })  # fmt: skip
        return None

    def _loss(self) -> str:
        return self.trainer.workload.objective.name

    def _kernels(self) -> list[str]:
        return sorted(kernels_of(self.model)) if device_of(self.model).type == "cuda" else []

    def _conclude(self, before: ExactMatch | None, after: ExactMatch | None) -> None:
        self.training.save_adapter(ADAPTER)
        if self.trainer.most_tokens is not None:
            self.run.summary["plan"]["most_tokens"] = self.trainer.most_tokens
        samples = [
            {"prompt": self._plain(row.prompt), "question": self._plain(last_turn(self.eval_data.template, row.prompt)),
             "reference": row.answer, "before": b, "before_matches": b_matches, "after": a, "after_matches": a_matches}
            for row, b, b_matches, a, a_matches in zip(self.eval_data.examples, before.answers, before.matches,
                                                       after.answers, after.matches, strict=False) if row.answer
        ][:SAMPLES] if before and after else []  # fmt: skip
        self.run.summary.update(**self.figures(), status=COMPLETE, ended_by=self.training.ended_by,
                        adapter_step=self.training.adapter_step, samples=samples)  # fmt: skip
        self.run.write_summary()
        write_report(self.run.path)
        log.info("done: %d steps in %s, peak memory %s", self.trainer.step,
                 format_seconds(self.run.summary["seconds"]), format_bytes(self.run.summary["peak_bytes"]))  # fmt: skip

    def _plain(self, prompt: str) -> str:
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _other_results(recipe: Recipe) -> list[str]:
    """Say which settings that spare memory or time give other results than the same run without them."""
    settings = {
        "model.quant_head: the head is in 4 bit, which is another model than the one with its 16-bit head; losses and "
        "answers differ": recipe.model.quant_head,
        "train.compile: results differ by rounding from those of a run without it": recipe.train.compile,
    }
    return [what for what, is_set in settings.items() if is_set]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
