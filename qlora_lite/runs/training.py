"""The course of a run once model and rows are there: measure, train with evaluations and checkpoints, measure again.

All that it must remember to go on after an interruption is in ``_progress``; the rest is the trainer's state. Between
two steps both belong together, and only there are they saved.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from qlora_lite.adapters.files import save_adapter
from qlora_lite.adapters.read import CONFIG_NAME, WEIGHTS_NAME
from qlora_lite.artifacts.run_files import METRICS_DIGEST, with_present_names
from qlora_lite.artifacts.run_folder import (
    CHECKPOINTS,
    digests_of,
    how_to_go_on,
    newest_checkpoint,
    package_versions,
    rewind_run,
    trained_folders,
)
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.errors import CheckpointError, Interrupted, OutputError
from qlora_lite.inference.evaluate import answered_at_once, watching
from qlora_lite.models.memory_options import settle
from qlora_lite.prepare.moment import AFTER, BEFORE, DURING, Measured, Moment
from qlora_lite.prepare.task import find_task
from qlora_lite.quant.tensor_file import bit_sums
from qlora_lite.train.checkpoints import Checkpoint, Tensors
from qlora_lite.train.divided_weights import fill_here, parts_of, tensors_here
from qlora_lite.train.guards import check_frozen
from qlora_lite.train.loop import StepMetrics
from qlora_lite.train.state import STATE, capture, collection_of, compare_tensors, restore
from qlora_lite.train.whole_tensors import Collection, Whole, layout_of, parts_here

from .async_checkpoint import Saver
from .references import with_references
from .resume import OF_RANKS, RUN, Continuation
from .signals import StopNow
from .stages import Proven, Trained, write_data
from .tracking import tracking

log = logging.getLogger("qlora_lite")
BEST = "best.safetensors"
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


def _are_alike(before: list[float] | None, now: list[float] | None) -> bool:
    """Return whether what the reference model gives is what it gave, but for a GPU's rounding."""
    if before is None or now is None:
        return before is now
    return all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(before, now, strict=True))


class Training:
    """The course of a run's training."""

    def __init__(self, proven: Proven):
        self.proven, self.recipe, self.run, self.trainer = proven, proven.recipe, proven.run, proven.trainer
        self.model, self.method = proven.model, self.trainer.workload.method
        self.task = find_task(self.recipe)
        self.best, self.last = trained_folders(self.recipe)  # names of the folders of what is trained
        self.eval_data, self.stop = proven.data.eval_data, proven.stop
        self.progress, self.watch, self.processes = proven.progress, proven.watch, proven.processes
        self.trainer.watch, self.step_began = self._watch_step, 0.0
        self.best_loss, self.best_step = math.inf, 0
        self.best_factors: Tensors | None = None
        self.reference: list[float] | None = None  # means of what the reference model gives the first step's rows
        self.eval_metrics: dict[str, float] = {}  # of the objective, of the newest evaluation
        self.best_metrics: dict[str, float] = {}  # of that with the best loss
        self.evaluated_step = self.measured_step = 0
        self.evaluations_without_better = 0  # in a row, of those in training
        self.before: Measured | None = None
        self.totals = {"steps": 0, "seconds": 0.0, "tokens": 0, "target_tokens": 0}
        self.own_steps, self.own_seconds, self.waited_seconds = 0, 0.0, 0.0  # of this part of the run
        self.earlier_peak_bytes = 0
        self.digests: dict[str, str | None] = {}  # of the adapters written, as the summary names them
        self.is_trained = False  # from then on the factors may be the best ones, and not those of the last step

    @property
    def peak_bytes(self) -> int:
        """The most memory held so far, in all parts of the run."""
        return max(self.earlier_peak_bytes, self.proven.meter.peak_bytes())

    @property
    def ends_early(self) -> bool:
        """Whether so many evaluations brought no better loss that there is no point in going on."""
        is_due = 0 < self.recipe.train.early_stopping_patience <= self.evaluations_without_better
        return is_due and self.trainer.step < self.trainer.total_steps

    def figures(self) -> dict:
        """Return what the summary says of the steps so far."""
        speed = self.totals["tokens"] / self.totals["seconds"] if self.totals["steps"] else None
        return (
            self.totals
            | {"skipped_steps": self.trainer.skipped}
            | self.digests
            | {
                "tokens_per_second": speed,
                "peak_bytes": self.peak_bytes,
                METRICS_DIGEST: self.run.metrics_hash.hexdigest(),
            }
        )

    def _resume(self, continuation: Continuation) -> None:
        """Put everything back to where the checkpoint was made, and write down what is different."""
        if self.processes.is_first:
            continuation.say_changes(self.proven.environment)
        self.restore(continuation)
        if not self.processes.is_first:
            return
        self.run.proven = True
        rewind_run(self.run, self.best_factors is not None, continuation.run.get(METRICS_DIGEST))
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
            self._restore_progress(continuation)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's {RUN} is not what this version writes: {error!r}") from None

    def _restore_progress(self, continuation: Continuation) -> None:
        saved, best = continuation.run["progress"], continuation.checkpoint.tensors.get(BEST, {})
        self.evaluated_step, self.earlier_peak_bytes = int(saved["evaluated_step"]), int(saved["peak_bytes"])
        self.measured_step = int(saved.get("measured_step", 0))
        self.evaluations_without_better = int(saved["evaluations_without_better"])
        if not _are_alike(saved.get("reference_of_step_1", self.reference), self.reference):
            change = "other values of the reference model than before"
            if not continuation.forced:  # other rows have other values too
                change = f"{change}: lora.init_from is not the adapter that the run began with"
            continuation.refuse([change])
        totals = with_present_names(saved["totals"])
        self.totals = {name: type(zero)(totals[name]) for name, zero in self.totals.items()}
        if (before := saved["before"]) is not None:
            answers = tuple(map(str, before["answers"]))
            matches = before.get("matches", [None] * len(answers))
            self.before = Measured({}, answers, tuple(matches))  # its scores are in the summary
        if saved["best_loss"] is not None:
            compare_tensors(best, self.method.tensors(self.model), BEST)
            best = parts_here(layout_of(self.method, self.model), self.processes.rank, best)
            self.best_loss, self.best_step = float(saved["best_loss"]), int(saved["best_step"])
            self.best_metrics = dict(saved.get("best_metrics", {}))
            self.best_factors = {name: tensor.clone() for name, tensor in best.items()}

    def _progress(self) -> dict:
        return {
            "evaluated_step": self.evaluated_step,
            "measured_step": self.measured_step,
            "totals": self.totals,
            "peak_bytes": self.peak_bytes,
            "evaluations_without_better": self.evaluations_without_better,
            "before": self.before and {"answers": self.before.answers, "matches": self.before.matches},
            "best_loss": None if self.best_factors is None else self.best_loss,
            "best_step": self.best_step,
            "best_metrics": self.best_metrics,
            "reference_of_step_1": self.reference,
        }

    def go(self) -> Trained:
        """See ``train``."""
        t, continuation = self.recipe.train, self.proven.continuation
        if self.trainer.workload.objective.needs_reference:
            with self._at_once():
                self._add_references()
        if continuation:
            with self.stop.at_once():
                self._resume(continuation)
        with Saver(
            self.run.path / CHECKPOINTS,
            t.save_every_steps,
            t.save_every_minutes,
            t.keep_checkpoints,
            self.run.flush_metrics,
            package_versions(),
            self.recipe.recipe_hash,
            continuation.checkpoint.step if continuation else None,
        ) as self.saver:
            self._check_alike()
            try:
                with tracking(t.trackers, self.recipe.output.name or "qlora-lite", self.run.path) as self.track:
                    self.processes.wait(long=True)  # for the first, whose trackers have begun
                    if continuation is None:
                        self.before = self._measure(BEFORE)
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
        self._save_adapter(self.best)
        if self.method.trains_base:  # what an earlier stop may have left
            shutil.rmtree(self.run.path / self.last, ignore_errors=True)
        step = self.trainer.step if self.best_factors is None else self.best_step
        limit = "max_steps" if t.max_steps else "epochs"
        ended_by = f"train.{'early_stopping_patience' if self.ends_early else limit}"
        return Trained(**vars(self.proven), before=self.before, after=after, adapter_step=step, ended_by=ended_by)

    def _add_references(self) -> None:
        """Let the examples hold what the model gives them now, before the first step."""
        with_them = partial(with_references, trainer=self.trainer, checksum=self.proven.checksum, watch=self.watch)
        epochs, total = self.trainer.epochs, self.trainer.total_steps
        self.trainer.examples = examples = with_them(self.proven.data.data.examples, used=epochs.rows_of(total))
        found = examples.references
        if found is not None:
            self.reference = found[examples.order[epochs.rows_of(1)]].mean(axis=0).tolist()
        if self.eval_data is not None:
            self.eval_data = replace(self.eval_data, examples=with_them(self.eval_data.examples))

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
            self._note(metrics)
            self.stop.check(self.processes.any)
            self._evaluate_if_due()
            self._measure_if_due()
            if self.processes.any(self.saver.due(metrics.step)):
                self._save_checkpoint()
            self.stop.check(self.processes.any)
            before, self.step_began = self.processes.waited_seconds, time.monotonic()
        if self.ends_early:
            log.info(
                "step %d: %d evaluations in a row brought no better loss; training ends here "
                "(train.early_stopping_patience)",
                self.trainer.step,
                self.evaluations_without_better,
            )
        self._save_checkpoint()
        if not self.method.trains_base:  # a whole model is in the checkpoint, and need not be written twice
            self._save_adapter(self.last)
            self.processes.wait(long=True)

    def _note(self, metrics: StepMetrics) -> None:
        values = metrics.line
        self._log(values)
        self.totals = {name: self.totals[name] + values.get(name, 0) for name in self.totals} | {"steps": metrics.step}
        if self.progress:
            try:
                self.progress(metrics, self.trainer.total_steps)
            except OSError as error:  # whoever watched is gone; what is learned is worth more
                log.warning("step %d: progress cannot be shown (%s); training goes on", metrics.step, error)
                self.progress = None

    def _watch(self, what: str, done: int, total: int) -> None:
        if self.watch:
            try:
                self.watch(what, done, total)
            except OSError:  # as in ``_note``, which says it
                self.watch = None

    def _watch_step(self, done: int, total: int) -> None:
        """Show how far a slow step is."""
        if done < total and time.monotonic() - self.step_began >= SLOW_SECONDS:
            self._watch(f"micro-batches of step {self.trainer.step}", done, total)

    def _log(self, values: dict) -> None:
        self.run.log_metrics(values)
        self.track(values, values["step"])

    def _evaluate_if_due(self) -> None:
        step, every = self.trainer.step, self.recipe.train.eval_every_steps
        due = every > 0 and step % every == 0 and self.evaluated_step < step < self.trainer.total_steps
        if due and self.eval_data is not None:
            self._check_alike()
            is_better = self._keep_if_best(self._eval_loss(self.eval_data))
            self.evaluations_without_better = 0 if is_better else self.evaluations_without_better + 1
            self.evaluated_step = step

    def _at_once(self) -> AbstractContextManager[None]:
        """Let a signal end what is left half done by nobody; of several ranks, at the next place where all agree."""
        return self.stop.at_once() if self.processes.world_size == 1 else nullcontext()

    def _check_alike(self) -> None:
        """Check that all ranks have learned the same, bit for bit."""
        parts = parts_of(self.model).values
        alike = [p for p in self.trainer.parameters if p not in parts] if self.processes.world_size > 1 else []
        sums = list(map(bit_sums, alike))
        self.processes.wait()
        self.processes.require_equal("weights", str(sums))

    def _eval_loss(self, eval_data: Dataset) -> float:
        with self._at_once():
            examples = eval_data.examples
            result = self.trainer.evaluate(examples, watching(self._watch, "evaluation", len(examples)))
        step = self.trainer.step
        self.eval_metrics = dict(result.metrics)
        likelihood = {"eval_perplexity": result.perplexity} if self.trainer.workload.objective.is_likelihood else {}
        self._log(
            {
                "step": step,
                "eval_loss": result.loss,
                **likelihood,
                "eval_target_tokens": result.target_tokens,
                **{f"eval_{name}": value for name, value in result.metrics.items()},
            }
        )
        log.info("step %d: evaluation loss %.4f", step, result.loss)
        return result.loss

    def _measure_if_due(self) -> None:
        step, every = self.trainer.step, self.recipe.train.metrics_every_steps
        due = every > 0 and step % every == 0 and self.measured_step < step < self.trainer.total_steps
        if due and self.eval_data is not None:
            if result := self.task.metrics(self._moment(DURING)):
                self._log({"step": step, **{name: score.value for name, score in result.scores.items()}})
            self.measured_step = step

    def _measure(self, when: str, loss: float | None = None) -> Measured | None:
        """Measure loss, if it is not known, and the metrics; ``when`` is BEFORE or AFTER."""
        moment, result = self._moment(when), None
        if self.eval_data is not None:
            self.run.update(**{f"eval_loss_{when}": self._eval_loss(self.eval_data) if loss is None else loss})
            if metrics := self.eval_metrics if loss is None else self.best_metrics:
                self.run.update(eval_metrics=self.run.summary.get("eval_metrics", {}) | {when: metrics})
            result = self.task.metrics(moment)
        result = self.task.illustrate(moment, result)
        if result:
            found = result.figures()
            if "exact_match" in found:
                exact = {f"exact_match_{when}": found["exact_match"], "exact_match_rows": found["exact_match_rows"]}
                self.run.update(**exact)
            self.run.update(metrics=self.run.summary.get("metrics", {}) | {when: found["metrics"]})
        return result

    def _moment(self, when: str) -> Moment:
        return Moment(
            when=when,
            recipe=self.recipe,
            trainer=self.trainer,
            reader=self.proven.tokenizer,
            data=self.proven.data.data,
            eval_data=self.eval_data,
            folder=self.run.path,
            kept=self.proven.kept,
            watch=self._watch,
            at_once=self._at_once,
            prompts_at_once=self._prompts_at_once,
            summary=self.run.summary,
            record=self.run.update,
        )

    def _prompts_at_once(self, tokens: int) -> int:
        """Return how many prompts all ranks have room for, given the tokens of the longest with its answer."""
        own = answered_at_once(self.recipe, self.model, self.proven.budget_bytes, tokens)
        return int(min(self.processes.gather(own)))

    def _keep_if_best(self, loss: float) -> bool:
        """Keep the factors if their loss is the best one so far; return whether it is."""
        if not loss < self.best_loss:  # NaN is never better
            return False
        self.best_loss, self.best_step, self.best_metrics = loss, self.trainer.step, self.eval_metrics
        settle(self.model)
        factors = tensors_here(self.method, self.model).items()
        self.best_factors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in factors}
        self._try_save(self.best)
        return True

    def _measure_best(self) -> Measured | None:
        """Evaluate the end, go back to the best factors seen, and measure those."""
        self.is_trained = True
        if self.best_factors is not None:
            is_evaluated = self.evaluated_step >= self.trainer.step  # it ended early, with an evaluation
            if self.eval_data is not None and not is_evaluated:
                self._keep_if_best(self._eval_loss(self.eval_data))
            settle(self.model)
            fill_here(self.method, self.model, self.best_factors)
            return self._measure(AFTER, self.best_loss)
        return self._measure(AFTER)

    def _save_checkpoint(self) -> None:
        """Begin to write a checkpoint; all wait as long as the one before takes a slow disk."""
        with self._collected() as collection:
            if self.processes.is_first:
                capture = partial(self._capture, collection)
                self.saver.save(self.trainer.step, capture, copies=not self.method.trains_base)
        self.processes.wait(long=True)

    @contextmanager
    def _collected(self) -> Iterator[Collection | None]:
        """Let the first rank put together inside what ranks have divided, if they have, for which the others serve."""
        collection = collection_of(self.trainer, {} if self.best_factors is None else {BEST: self.best_factors})
        if collection is None:
            yield None
        elif self.processes.is_first:
            try:
                yield collection
            finally:
                collection.end()
        else:
            yield collection
            collection.serve()

    def _capture(self, collection: Collection | None) -> Checkpoint:
        self.run.write_metrics()  # a checkpoint that knows of lines that wait would lose them
        tensors, state = capture(self.trainer, not self.method.trains_base, collection)
        if self.best_factors is not None and collection is None:
            tensors[BEST] = self.best_factors
        proven = self.proven
        run = {
            "recipe": self.recipe.model_dump(mode="json"),
            "identity": proven.identity,
            "plan": proven.chosen,
            OF_RANKS: list(proven.plan.of_ranks),
            "environment": proven.environment,
            "progress": self._progress(),
            "summary": dict(self.run.summary),
            "metrics_bytes": self.run.metrics_bytes,
            METRICS_DIGEST: self.run.metrics_hash.hexdigest(),
        }
        config = self.method.config(self.model, self.recipe.model.path)
        return Checkpoint(self.trainer.step, tensors, {STATE: state, RUN: run, CONFIG_NAME: config})

    def _save_adapter(self, name: str) -> None:
        """Write the adapter, or the whole model that was trained, into the run's folder, and note its SHA-256."""
        folder = self.run.path / name
        if self.method.trains_base:
            with self._collected() as collection:
                if self.processes.is_first:
                    self._save_model(folder, collection)
                    self.digests |= digests_of(folder)
            return
        if not self.processes.is_first:
            return
        save_adapter(self.model, folder, self.recipe.model.path, self.proven.tokenizer, self.method)
        self.task.save_beside(self.model, folder)
        self.digests |= digests_of(folder)

    def _save_model(self, folder: Path, collection: Collection | None) -> None:
        found = collection.tensors[WEIGHTS_NAME] if collection else {}
        elsewhere = {name: each for name, each in found.items() if isinstance(each, Whole)}
        proven = self.proven
        self.task.save_model(
            self.recipe, self.model, folder, proven.tokenizer, proven.data.data.end_token_ids, elsewhere
        )

    def _try_save(self, name: str) -> None:
        try:
            self._save_adapter(name)
        except OutputError as error:
            log.warning("step %d: %s. Training goes on", self.trainer.step, error)
        self.processes.wait(long=True)

    def _interrupted(self, reason: str) -> Interrupted:
        """Save what was learned, and say how to go on."""
        step = self.trainer.step
        if step and not self.is_trained:
            self._save_checkpoint()
            self._try_save(self.last)
        self.saver.wait()
        newest = self.saver.newest_step
        if not step:
            kept = "nothing was trained yet"
        elif newest == step:
            kept = "all of it is saved"
        else:
            kept = f"{newest_checkpoint(newest)} ({self.saver.failure or 'none was due'})"
        return Interrupted(f"stopped by {reason} after step {step}; {kept}. {how_to_go_on(self.run.path)}")
