"""The course of a run once model and rows are there: measure, train with evaluations and checkpoints, measure again.

All that it must remember to go on after an interruption is its ``Progress``; the rest is the trainer's state. Between
two steps both belong together, and only there are they saved.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from qlora_lite.artifacts.run_files import METRICS_DIGEST
from qlora_lite.artifacts.run_folder import (
    how_to_go_on,
    newest_checkpoint,
    rewind_run,
)
from qlora_lite.errors import CheckpointError, Interrupted
from qlora_lite.models.memory_options import settle
from qlora_lite.prepare.moment import Measured
from qlora_lite.quant.tensor_file import bit_sums
from qlora_lite.train.divided_weights import fill_here, parts_of, tensors_here
from qlora_lite.train.guards import check_frozen
from qlora_lite.train.loop import StepMetrics
from qlora_lite.train.state import compare_tensors, restore
from qlora_lite.train.step import Evaluation
from qlora_lite.train.whole_tensors import layout_of, parts_here

from .measuring import Measuring
from .progress import Best, Progress, are_alike
from .references import with_references
from .resume import RUN, Continuation
from .saving import BEST, Saving
from .signals import StopNow
from .stages import Proven, Trained, write_data
from .tracking import tracking

log = logging.getLogger("qlora_lite")
SLOW_SECONDS = 2.0  # of a step, from which on its micro-batches are shown


def train(proven: Proven) -> Trained:
    """Train to the end, from the checkpoint if the run resumes from one, and save the best adapter.

    Raises:
        Interrupted: the run was stopped between steps; what was learned is saved.
        KeyboardInterrupt: it was stopped at once; nothing was saved.
        QloraLiteError: see its subclasses.
    """
    training = Training(proven)
    try:
        return training.go()
    finally:
        proven.run.summary.update(training.figures())
        proven.trainer.watch = None


class Training:
    """The course of a run's training; ``progress`` is how far it is."""

    def __init__(self, proven: Proven):
        self.proven, self.run, self.trainer = proven, proven.run, proven.trainer
        self.model, self.method = proven.model, proven.trainer.workload.method
        self.processes, self.stop, self.settings = proven.processes, proven.stop, proven.recipe.train
        self.saving, self.measuring = Saving(proven), Measuring(proven, self._note, self._watch)
        self.progress = Progress()
        self.track: Callable[[dict, int], None] = lambda values, step: None
        self.show, self.watch = proven.progress, proven.watch
        self.trainer.watch, self.step_began = self._watch_step, 0.0
        self.own_steps, self.own_seconds, self.waited_seconds = 0, 0.0, 0.0  # of this part of the run
        self.is_trained = False  # from then on the weights may be the best ones, and not those of the last step

    @property
    def peak_bytes(self) -> int:
        """The most memory held so far, in all parts of the run."""
        return max(self.progress.earlier_peak_bytes, self.proven.meter.peak_bytes())

    @property
    def ends_early(self) -> bool:
        """Whether so many evaluations brought no better loss that there is no point in going on."""
        is_due = 0 < self.settings.early_stopping_patience <= self.progress.evaluations_without_better
        return is_due and self.trainer.step < self.trainer.total_steps

    def figures(self) -> dict:
        """Return what the summary says of the steps so far."""
        totals = self.progress.totals
        return (
            asdict(totals)
            | {"skipped_steps": self.trainer.skipped}
            | self.saving.digests
            | {
                "tokens_per_second": totals.tokens / totals.seconds if totals.steps else None,
                "peak_bytes": self.peak_bytes,
                METRICS_DIGEST: self.run.metrics_hash.hexdigest(),
            }
        )

    def go(self) -> Trained:
        """See ``train``."""
        continuation = self.proven.continuation
        if self.trainer.workload.objective.needs_reference:
            with self.measuring.at_once():
                self._add_references()
        if continuation:
            with self.stop.at_once():
                self._resume(continuation)
        with self.saving.saver:
            self._check_alike()
            try:
                name = self.proven.recipe.output.name or "qlora-lite"
                with tracking(self.settings.trackers, name, self.run.path) as self.track:
                    self.processes.wait(long=True)  # for the first, whose trackers have begun
                    if continuation is None:
                        self.progress = replace(self.progress, before=self.measuring.before())
                    self.run.trains = True
                    self._train()
                    after = self._measure_best()
            except StopNow as cut:
                if cut.stop is not self.stop:  # a second signal, by the caller's handler: perhaps in half a step
                    raise
                raise self._interrupted(str(cut)) from None
        check_frozen(self.model, self.proven.checksum, self.method.trained_base(self.model))
        self._check_alike()
        if self.processes.world_size > 1:
            self.run.summary["ranks"] = self._figures_of_ranks()
        self.saving.end(self.progress)
        best = self.progress.best
        return Trained(
            **vars(self.proven),
            before=self.progress.before,
            after=after,
            adapter_step=self.trainer.step if best is None else best.step,
            ended_by=f"train.{self._limit()}",
        )

    def _limit(self) -> str:
        if self.ends_early:
            return "early_stopping_patience"
        return "max_steps" if self.settings.max_steps else "epochs"

    def _resume(self, continuation: Continuation) -> None:
        """Put everything back to where the checkpoint was made, and write down what is different."""
        if self.processes.is_first:
            continuation.say_changes(self.proven.environment)
        self.restore(continuation)
        if not self.processes.is_first:
            return
        self.run.proven = True
        rewind_run(self.run, self.progress.best is not None, continuation.run.get(METRICS_DIGEST))
        write_data(self.run, self.proven.data)
        part = {
            "after_step": self.trainer.step,
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "changes": continuation.accepted,
            "forced_changes": continuation.forced,
        }
        self.run.update(status="running", resumed=[*self.run.summary.get("resumed", []), part])

    def restore(self, continuation: Continuation) -> None:
        """Take trainer and progress from a checkpoint.

        Raises:
            CheckpointError: it does not fit this run.
        """
        restore(self.trainer, continuation.checkpoint)
        try:
            self.progress = self._restored(continuation)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's {RUN} is not what this version writes: {error!r}") from None

    def _restored(self, continuation: Continuation) -> Progress:
        of_best, reference = continuation.checkpoint.tensors.get(BEST, {}), self.progress.reference
        saved = Progress.read({"reference_of_step_1": reference} | continuation.run["progress"], of_best)
        if not are_alike(saved.reference, reference):
            change = "other values of the reference model than before"
            if not continuation.forced:  # other rows have other values too
                change = f"{change}: lora.init_from is not the adapter that the run began with"
            continuation.refuse([change])
        if saved.best is None:
            return replace(saved, reference=reference)
        compare_tensors(of_best, self.method.tensors(self.model), BEST)
        here = parts_here(layout_of(self.method, self.model), self.processes.rank, of_best)
        best = replace(saved.best, tensors={name: tensor.clone() for name, tensor in here.items()})
        return replace(saved, reference=reference, best=best)

    def _add_references(self) -> None:
        """Let the examples hold what the model gives them now, before the first step."""
        with_them = partial(with_references, trainer=self.trainer, checksum=self.proven.checksum, watch=self.watch)
        epochs, total = self.trainer.epochs, self.trainer.total_steps
        self.trainer.examples = examples = with_them(self.proven.data.data.examples, used=epochs.rows_of(total))
        found, rows = examples.references, self.measuring.eval_data
        if found is not None:
            first = found[examples.order[epochs.rows_of(1)]].mean(axis=0).tolist()
            self.progress = replace(self.progress, reference=first)
        if rows is not None:
            self.measuring.eval_data = replace(rows, examples=with_them(rows.examples))

    def _figures_of_ranks(self) -> list[dict]:
        """Return what differs between ranks: memory, and of a step's mean seconds those it waited for the others."""
        taken, waited = (seconds / max(1, self.own_steps) for seconds in (self.own_seconds, self.waited_seconds))
        columns = map(self.processes.gather, (self.peak_bytes, max(0.0, taken - waited), waited))
        return [
            {"peak_bytes": int(peak), "computing_seconds": computing, "waiting_seconds": waiting}
            for peak, computing, waiting in zip(*columns, strict=True)
        ]

    def _train(self) -> None:
        self._evaluate_if_due()  # the run may have been stopped between a step and its evaluation
        self._measure_if_due()
        steps = iter(self.trainer)
        before = self.processes.waited_seconds
        self.step_began = time.monotonic()
        while not self.ends_early and (metrics := next(steps, None)):
            self.own_steps, self.own_seconds = self.own_steps + 1, self.own_seconds + metrics.seconds
            self.waited_seconds += self.processes.waited_seconds - before
            self._note_step(metrics)
            self.stop.check(self.processes.any)
            self._evaluate_if_due()
            self._measure_if_due()
            if self.processes.any(self.saving.saver.due(metrics.step)):
                self.saving.checkpoint(self.progress)
            self.stop.check(self.processes.any)
            before, self.step_began = self.processes.waited_seconds, time.monotonic()
        if self.ends_early:
            log.info(
                "step %d: %d evaluations in a row brought no better loss; training ends here "
                "(train.early_stopping_patience)",
                self.trainer.step,
                self.progress.evaluations_without_better,
            )
        self.saving.checkpoint(self.progress)
        self.saving.last_trained(self.progress)

    def _note(self, values: dict) -> None:
        self.run.log_metrics(values)
        self.track(values, values["step"])

    def _note_step(self, metrics: StepMetrics) -> None:
        self._note(metrics.line)
        self.progress = replace(self.progress, totals=self.progress.totals.plus(metrics))
        if self.show:
            try:
                self.show(metrics, self.trainer.total_steps)
            except OSError as error:  # whoever watched is gone; what is learned is worth more
                log.warning("step %d: progress cannot be shown (%s); training goes on", metrics.step, error)
                self.show = None

    def _watch(self, what: str, done: int, total: int) -> None:
        if self.watch:
            try:
                self.watch(what, done, total)
            except OSError:  # as in ``_note_step``, which says it
                self.watch = None

    def _watch_step(self, done: int, total: int) -> None:
        """Show how far a slow step is."""
        if done < total and time.monotonic() - self.step_began >= SLOW_SECONDS:
            self._watch(f"micro-batches of step {self.trainer.step}", done, total)

    def _is_due(self, every: int, done: int) -> bool:
        """Return whether it is time for what is done every so many steps, and was last done at some step."""
        step = self.trainer.step
        is_due = every > 0 and step % every == 0 and done < step < self.trainer.total_steps
        return is_due and self.measuring.eval_data is not None

    def _evaluate_if_due(self) -> None:
        if self._is_due(self.settings.eval_every_steps, self.progress.evaluated_step):
            self._check_alike()
            best = self._better(self.measuring.evaluate())
            self.progress = self.progress.with_evaluation(self.trainer.step, best)
            if best:
                self.saving.try_trained(self.saving.best, self.progress)

    def _measure_if_due(self) -> None:
        if self._is_due(self.settings.metrics_every_steps, self.progress.measured_step):
            self.measuring.in_training()
            self.progress = replace(self.progress, measured_step=self.trainer.step)

    def _check_alike(self) -> None:
        """Check that all ranks have learned the same, bit for bit."""
        parts = parts_of(self.model).values
        alike = [p for p in self.trainer.parameters if p not in parts] if self.processes.world_size > 1 else []
        sums = list(map(bit_sums, alike))
        self.processes.wait()
        self.processes.require_equal("weights", str(sums))

    def _better(self, found: Evaluation | None) -> Best | None:
        """Return the present weights if their loss is the lowest so far; None if it is not."""
        best = self.progress.best
        if found is None or not found.loss < (math.inf if best is None else best.loss):  # NaN is never better
            return None
        settle(self.model)
        here = tensors_here(self.method, self.model).items()
        tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in here}
        return Best(found.loss, self.trainer.step, dict(found.metrics), tensors)

    def _measure_best(self) -> Measured | None:
        """Evaluate the end, go back to the best weights seen, and measure those."""
        self.is_trained = True
        best = self.progress.best
        if best is None:
            return self.measuring.after(None)
        if self.progress.evaluated_step < self.trainer.step and (better := self._better(self.measuring.evaluate())):
            best, self.progress = better, replace(self.progress, best=better)
            self.saving.try_trained(self.saving.best, self.progress)
        settle(self.model)
        fill_here(self.method, self.model, best.tensors)
        return self.measuring.after(best)

    def _interrupted(self, reason: str) -> Interrupted:
        """Save what was learned, and say how to go on."""
        step, saver = self.trainer.step, self.saving.saver
        if step and not self.is_trained:
            self.saving.checkpoint(self.progress)
            self.saving.try_trained(self.saving.last, self.progress)
        saver.wait()
        newest = saver.newest_step
        if not step:
            kept = "nothing was trained yet"
        elif newest == step:
            kept = "all of it is saved"
        else:
            kept = f"{newest_checkpoint(newest)} ({saver.failure or 'none was due'})"
        return Interrupted(f"stopped by {reason} after step {step}; {kept}. {how_to_go_on(self.run.path)}")
