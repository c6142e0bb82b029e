"""From a recipe to a trained adapter: the one place where all parts meet.

Lower layers take plain arguments; recipes stop here. The order is chosen so that what is cheap fails first:
the run folder, the tokenizer, the data, then the model, then the memory, then the training.
"""

import json
import logging
import math
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from .build import build_model
from .data.template import portable_source
from .data_page import write_data_page
from .errors import DoesNotFitError, Interrupted, QloraLiteError
from .evaluate import ExactMatch, exact_match
from .files import write_text
from .lora.adapter import adapter_tensors, fill_adapter, save_adapter
from .memory.meter import PeakMeter, mapped_bytes
from .models.anatomy import device_of
from .models.cache import base_fingerprint
from .models.load import resolve_device
from .models.locate import locate
from .models.tokenizer import load_tokenizer
from .plan import alternatives, expected_peak, plan_run, reason
from .preflight import line_of_problem, preflight
from .recipe.schema import Recipe
from .report import write_report
from .rows import build_stream, rows_to_plan
from .runs import ADAPTER, ADAPTER_LAST, TEMPLATE, RunFolder, create_run, package_versions
from .train.guards import check_frozen, frozen_checksum
from .train.inventory import inventory, total_parameters
from .train.loop import StepMetrics, Trainer, largest_batches
from .units import format_bytes, format_count, format_seconds

log = logging.getLogger("qlora_lite")
SAMPLES = 4
CURES = "lower data.max_tokens or lora.rank, or give it more memory"

Progress = Callable[[StepMetrics, int], None]


def run_recipe(recipe: Recipe, progress: Progress | None = None) -> Path:
    """Run a recipe to its end; return the run folder.

    Args:
        progress: called after every step with its metrics and the total number of steps.

    Raises:
        QloraLiteError: see its subclasses; the summary then says "failed" or "interrupted".
    """
    run = create_run(recipe)
    with _logging_to(run.path / "log.txt"), _stop_signals() as stop:
        try:
            _Run(recipe, run, progress, stop).execute()
        except (QloraLiteError, KeyboardInterrupt) as error:
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            run.update(status="interrupted" if stopped else "failed", error=str(error))
            write_report(run.path)
            raise
    return run.path


class _Run:
    """One execution of a recipe: the state that its stages share."""

    def __init__(self, recipe: Recipe, run: RunFolder, progress: Progress | None, stop: list[int]):
        self.recipe, self.run, self.progress, self.stop = recipe, run, progress, stop
        self.best_loss, self.best_factors = math.inf, None

    def execute(self) -> None:
        """Go through the stages."""
        recipe = self.recipe
        self.tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
        self._look_at_data()
        with PeakMeter(resolve_device(recipe.model.device)) as self.meter:
            self.rows = rows_to_plan(recipe, self.data)
            self._plan()
            self.model = build_model(recipe, levers=self.settings.levers)
            self.trainer = Trainer(self.model, self.rows, self.settings, build_stream(recipe, self.tokenizer))
            self._describe_model()
            checksum = frozen_checksum(self.model)
            with _explaining_memory():
                self._rehearse()
                before = self._evaluate("before")
                self._train()
                after = self._evaluate_best()
            check_frozen(self.model, checksum)
            self._conclude(before, after)

    def _look_at_data(self) -> None:
        """Read the rows, write down what they are, and stop where training on them would be a mistake."""
        found = preflight(self.recipe, self.tokenizer)
        self.data, self.eval_data, report = found.data, found.eval_data, found.report
        write_text(self.run.path / "data.json", json.dumps(report, indent=2) + "\n")
        write_data_page(report, self.run.path / "data.html", self.recipe.output.name)
        counts = ("rows_read", "rows_kept", "dropped", "tokens", "learned_tokens", "packing_efficiency")
        self.run.update(data={key: report[key] for key in counts} | {"end_token_ids": sorted(self.data.end_token_ids)})
        found.raise_if_unusable()
        if self.data.template:  # for generate, chat and evaluate, and (in the tokenizer) for other tools
            source = portable_source(self.data.template)
            write_text(self.run.path / TEMPLATE, source)
            if self.data.template.name != "model":
                self.tokenizer.chat_template = source
        for problem in report["problems"]:
            log.warning("data: %s", line_of_problem(problem))
        efficiency = report["packing_efficiency"]
        log.info(
            "data: %d of %d rows, %d tokens, %d learned%s%s", report["rows_kept"], report["rows_read"],
            report["tokens"], report["learned_tokens"], f", dropped: {report['dropped']}" if report["dropped"] else "",
            f", {report['packs']} packs {efficiency:.0%} full" if efficiency else "",
        )  # fmt: skip

    def _describe_model(self) -> None:
        table = inventory(self.model)
        trainable = sum(parameter.numel() for parameter in self.trainer.parameters)
        for entry in table:
            log.info("memory: %-26s %-9s %-6s %10s  %s", entry.group, entry.dtype, entry.device,
                     format_bytes(entry.bytes), entry.why)  # fmt: skip
        log.info("model: %s weights, %s trainable", format_count(total_parameters(self.model)),
                 format_count(trainable))  # fmt: skip
        self.run.update(
            device=_device_name(device_of(self.model)), trainable_parameters=trainable,
            memory_table=[asdict(entry) for entry in table],
            versions=package_versions(),
            base_fingerprint=base_fingerprint(locate(self.recipe.model.path, self.recipe.model.revision)),
        )  # fmt: skip

    def _plan(self) -> None:
        """Choose how to run the step before anything large is loaded; what cannot fit ends the run here."""
        eval_examples = self.eval_data.examples if self.eval_data else ()
        self.plan, self.settings = plan_run(self.recipe, self.rows, eval_examples)
        log.info("plan: %s", reason(self.plan))

    def _rehearse(self) -> None:
        """Run the largest micro-batch and evaluation batch once, and compare with the plan and the budget."""
        budget, device = self.plan.budget_bytes, device_of(self.model)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        eval_examples = self.eval_data.examples if self.eval_data else ()
        expected = expected_peak(self.plan, *largest_batches(self.rows, eval_examples, self.settings))
        mapped = mapped_bytes((*self.model.parameters(), *self.model.buffers()))
        predicted = self.plan.machine.base_bytes + expected.peak_bytes - mapped
        self.trainer.rehearse(eval_examples)
        peak = self.meter.peak_bytes()
        place = expected.simulation.peak()
        log.info("memory: the largest micro-batch peaks at %s (predicted %s, %s of %s); budget %s", format_bytes(peak),
                 format_bytes(predicted), place.phase, place.module or "the loss", format_bytes(budget))  # fmt: skip
        self.run.update(plan={
            "budget_bytes": budget, "predicted_peak_bytes": predicted, "measured_peak_bytes": peak,
            "chosen": self.plan.chosen.settings, "why": reason(self.plan),
        })  # fmt: skip
        if peak > budget:
            others = [a for a in alternatives(self.plan) if a.peak_bytes < self.plan.peak_bytes - (peak - budget)]
            cure = f"{others[0].change} needs less" if others else CURES
            raise DoesNotFitError(
                f"the largest micro-batch peaks at {format_bytes(peak)}, over the budget of {format_bytes(budget)}; "
                f"{cure}"
            )

    def _train(self) -> None:
        t, total = self.recipe.train, self.trainer.total_steps
        done = {"steps": 0, "seconds": 0.0, "tokens": 0, "labelled_tokens": 0}
        try:
            with _tracking(self.recipe, self.run.path) as track:
                for metrics in self.trainer:
                    values = asdict(metrics)
                    self.run.log_metrics(values)
                    track(values, metrics.step)
                    done = {name: done[name] + values.get(name, 0) for name in done} | {"steps": metrics.step}
                    if self.progress:
                        self.progress(metrics, total)
                    if _due(metrics.step, t.eval_every_steps) and self.eval_data and metrics.step < total:
                        self._keep_if_best(self._eval_loss(metrics.step))
                    if _due(metrics.step, t.save_every_steps) or self.stop:
                        self._save(ADAPTER_LAST)
                    self._raise_if_stopped()
        finally:
            speed = done["tokens"] / done["seconds"] if done["steps"] else None
            self.run.update(**done, tokens_per_second=speed, peak_bytes=self.meter.peak_bytes())
        self._save(ADAPTER_LAST)

    def _eval_loss(self, step: int) -> float:
        result = self.trainer.evaluate(self.eval_data.examples)
        self.run.log_metrics({"step": step, "eval_loss": result.loss, "eval_perplexity": result.perplexity,
                              "eval_labelled_tokens": result.labelled_tokens})  # fmt: skip
        log.info("step %d: evaluation loss %.4f", step, result.loss)
        self._raise_if_stopped()
        return result.loss

    def _evaluate(self, when: str) -> ExactMatch | None:
        """Measure loss and exact match; ``when`` is "before" or "after"."""
        if self.eval_data is None:
            return None
        self.run.update(**{f"eval_loss_{when}": self._eval_loss(self.trainer.step)})
        rows = self.eval_data.examples[: self.recipe.train.exact_match_rows]
        if not rows:
            return None
        result = exact_match(self.model, self.tokenizer, rows, self.eval_data.end_token_ids)
        log.info("exact match %s training: %.1f %% of %d rows", when, 100 * result.score, len(rows))
        self.run.update(**{f"exact_match_{when}": result.score, "exact_match_rows": len(rows)})
        self._raise_if_stopped()
        return result

    def _keep_if_best(self, loss: float) -> None:
        if loss < self.best_loss:
            self.best_loss = loss
            self.best_factors = {name: tensor.clone() for name, tensor in adapter_tensors(self.model).items()}
            self._save(ADAPTER)

    def _evaluate_best(self) -> ExactMatch | None:
        """Evaluate the end, go back to the best factors seen, and measure those."""
        if self.best_factors is not None:
            self._keep_if_best(self._eval_loss(self.trainer.step))
            fill_adapter(self.model, self.best_factors)
        return self._evaluate("after")

    def _save(self, name: str) -> str:
        return save_adapter(self.model, self.run.path / name, self.recipe.model.path, self.tokenizer)

    def _conclude(self, before: ExactMatch | None, after: ExactMatch | None) -> None:
        digest = self._save(ADAPTER)
        rows = self.eval_data.examples[:SAMPLES] if after else []
        samples = [
            {"prompt": self._plain(row.prompt), "reference": row.answer, "before": b, "after": a}
            for row, b, a in zip(rows, before.answers, after.answers, strict=False)
        ] if after else []  # fmt: skip
        self.run.update(status="complete", peak_bytes=self.meter.peak_bytes(), adapter_sha256=digest, samples=samples)
        write_report(self.run.path)
        log.info("done: %d steps in %s, peak memory %s", self.trainer.total_steps,
                 format_seconds(self.run.summary["seconds"]), format_bytes(self.meter.peak_bytes()))  # fmt: skip

    def _plain(self, prompt: str) -> str:
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _raise_if_stopped(self) -> None:
        if self.stop:
            last = self.run.path / ADAPTER_LAST
            kept = f"the adapter so far is in {last}" if last.exists() else "no adapter was trained yet"
            name = signal.Signals(self.stop[0]).name
            raise Interrupted(f"stopped by {name} after step {self.trainer.step}; {kept}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


@contextmanager
def _explaining_memory() -> Iterator[None]:
    """Turn torch's out-of-memory error into one that names the cures."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(f"the device ran out of memory: {str(error).splitlines()[0]}; {CURES}") from error


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    if not log.isEnabledFor(logging.INFO):  # a caller that has not set up logging still gets the whole log.txt
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list given; a second one acts at once."""
    received: list[int] = []
    earlier = {}

    def note(number, _frame):
        received.append(number)
        for each, handler in earlier.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            earlier[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are the caller's business
        pass
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def _tracking(recipe: Recipe, folder: Path) -> Iterator[Callable[[dict, int], None]]:
    """Give a function that sends metrics to the recipe's trackers, through accelerate."""
    if not recipe.train.trackers:
        yield lambda _values, _step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(recipe.train.trackers), project_dir=folder)
    accelerator.init_trackers(recipe.output.name or "qlora-lite")
    try:
        yield lambda values, step: accelerator.log(values, step=step)
    finally:
        accelerator.end_training()
