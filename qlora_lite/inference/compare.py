"""Measure several runs over one base model on the same rows, and put their answers side by side."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qlora_lite.adapters.prompt import count_virtual
from qlora_lite.artifacts.trained_run import TrainedRun
from qlora_lite.data.chat.render import last_turn
from qlora_lite.data.checks.metrics import check_packages
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.data.tokens.storage import row_lengths
from qlora_lite.errors import DataError, ModelError, RecipeError
from qlora_lite.files import explain_write_errors, write_text
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.datasets import build_data, held_out_digest, measures_of, warn_of_other_rows
from qlora_lite.prepare.job import likelihood_workload
from qlora_lite.prepare.settings import train_settings
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.schema import Recipe
from qlora_lite.reporting.compare_page import render_comparison
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.step import evaluate_loss
from qlora_lite.train.text_guards import check_forward

from .evaluate import (
    Watch,
    answered_at_once,
    context_tokens_of,
    losses_by,
    measurable,
    measure,
    new_tokens_of,
    shown_answer,
    watching,
)
from .few_shot import with_shots
from .multi_adapter import BASE, Tasks, load_tasks, open_runs

log = logging.getLogger("qlora_lite")
PAGE, REPORT = "compare.html", "compare.json"
# The settings of data that say which rows are measured.
_ROWS = "train", "eval", "eval_share", "streaming", "max_bad_rows", "max_tokens", "overflow"


def compare_runs(
    runs: str | Path | Sequence[str | Path | TrainedRun],
    with_base: bool = False,
    answers: int | None = None,
    model_path: str | None = None,
    unfinished: bool = False,
    watch: Watch | None = None,
    shots: int = 0,
) -> dict:
    """Measure runs on the evaluation rows of the first one, read and cut as it does, each with its own template.

    Args:
        with_base: measure the bare base model too, prompted as the first run is.
        answers: rows to measure the first run's train.metrics on; 0 for none, None for as many as its
            train.metrics_examples says.
        model_path, unfinished: see ``artifacts.trained_run.open_trained``.
        watch: told how far the comparison is.
        shots: training examples of the first run that the bare base model is also shown before each prompt; 0 leaves
            that out.

    Returns:
        rows_of, base_model, models (name, rows, target_tokens, eval_loss, perplexity, adapter_bytes, exact_match,
        metrics as ``evaluate_recipe`` gives them),
        same_tokens (whether all models were measured on as many rows and tokens, so that their losses can be ranked;
        few-shot apart, whose loss is of the last answers),
        and answers (prompt, its last turn as question, reference, and by name the answer of each model and whether it
        matches).

    Raises:
        RecipeError: the first run has no evaluation rows, or a metric's package is not installed.
        ModelError: the runs do not share a base.
    """
    opened = open_runs(runs, model_path, unfinished)
    for run in opened.values() if with_base or shots else ():
        run.require_base()
    if BASE in opened:
        raise ModelError(f"a run folder is called {BASE!r}, which names the base model here; rename it")
    rows_of = next(iter(opened.values()))
    if not rows_of.recipe.data.has_eval:
        raise RecipeError(f"{rows_of.name} has no data.eval or data.eval_share; put a run with evaluation data first")
    answers = rows_of.recipe.train.metrics_examples if answers is None else answers
    in_context = _check_rows(rows_of, answers, shots)
    longest = max(row_lengths(in_context.examples)) if in_context else 0
    needed = [context_tokens_of(run.recipe) for run in opened.values()]
    tasks = load_tasks(opened, max(*needed, longest + (new_tokens_of(rows_of.recipe) or 0)))
    check_forward(tasks.model, max(rows_of.recipe.data.max_tokens, longest))
    measured, said = [], {}
    for name in ([None] if with_base else []) + list(tasks.names):
        figures, said[name or BASE] = _measure(tasks, name, rows_of.recipe, answers, watch)
        measured.append(figures)
    same = len({(model["rows"], model["target_tokens"]) for model in measured}) == 1
    if in_context:
        called = f"{BASE}, {shots}-shot"
        figures, said[called] = _measure(tasks, None, rows_of.recipe, answers, watch, in_context, called)
        measured.insert(int(with_base), figures)
    return {
        "rows_of": rows_of.name,
        "base_model": rows_of.files.name,
        "models": measured,
        "same_tokens": same,
        "answers": _side_by_side({model["name"]: said[model["name"]] for model in measured}),
    }


def write_comparison(result: dict, folder: Path) -> None:
    """Write a comparison as JSON and as one offline page.

    Raises:
        OutputError: the folder cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / REPORT, json.dumps(result, indent=2) + "\n")
    write_text(folder / PAGE, render_comparison(result))


def _check_rows(rows_of: TrainedRun, answers: int, shots: int) -> Dataset | None:
    """Check that the rows can be measured, before a model is loaded; return those with shots, if there are any.

    Raises:
        QloraLiteError: a row or a reference is not what a metric needs, or a metric's package is not installed.
    """
    m = rows_of.recipe.model
    tokenizer = load_tokenizer(m.path, m.revision, rows_of.recipe.adapter.train_tokens)
    if answers:
        check_packages(rows_of.recipe.train.metrics)
    data = build_data(rows_of.recipe, tokenizer, "eval")
    warn_of_other_rows(rows_of.recipe, data, rows_of.held_out)
    measurable(data.examples[:answers], measures_of(rows_of.recipe))
    return with_shots(rows_of.recipe, tokenizer, data, shots) if shots else None


def _measure(
    tasks: Tasks,
    name: str | None,
    rows_of: Recipe,
    answers: int,
    watch: Watch | None,
    data: Dataset | None = None,
    called: str | None = None,
) -> tuple[dict, Sequence[dict]]:
    """Measure one adapter, or the bare base model for None.

    Args:
        data: examples in place of those that its recipe makes of the rows.
        called: its name in the comparison.
    """
    called = called or name or BASE
    with tasks.using(name) as task:
        own = task.run.recipe
        rows = own.data.model_copy(update={key: getattr(rows_of.data, key) for key in _ROWS})
        recipe = own.model_copy(update={"data": rows})
        data, settings = data or build_data(recipe, tasks.tokenizer, "eval"), train_settings(recipe)
        work = likelihood_workload(recipe, count_virtual(tasks.model)).with_options(settings.options)
        settings = replace(settings, max_tokens=max(settings.max_tokens, *work.batches.lengths(data.examples)))
        if name and own is not rows_of and _may_have_learned(task.run, rows_of, data, tasks.tokenizer):
            log.warning(
                "%s was trained on files from which %s held examples out, and may have seen those",
                name,
                rows_of.output.name,
            )
        done = watching(watch, f"{called}: evaluation", len(data.examples))
        loss = evaluate_loss(work, tasks.model, eval_batches(work, data.examples, settings, done))
        figures = {
            "name": called,
            "rows": len(data.examples),
            "target_tokens": loss.target_tokens,
            "eval_loss": loss.loss,
            "perplexity": loss.perplexity,
            "adapter_bytes": task.adapter_bytes if name else 0,
        }
        if not answers:
            return figures, []
        found = measure(
            tasks.model,
            tasks.tokenizer,
            data.examples[:answers],
            task.stop,
            losses_by(work, tasks.model, settings),
            partial(answered_at_once, rows_of, tasks.model, rows_of.memory.budget_bytes),
            measures_of(rows_of),
            new_tokens_of(rows_of),
            watch and (lambda what, *counts: watch(f"{called}: {what}", *counts)),
            reader=find_task(recipe).picture_reader(recipe),
        )
    said = [
        record
        | {
            "prompt": _plain(tasks, record["prompt"]),
            "question": _plain(tasks, last_turn(data.template, record["prompt"])),
            "answer": shown_answer(record),
        }
        for record in found.records
        if found.answers
    ]
    return figures | found.figures(), said


def _may_have_learned(run: TrainedRun, rows_of: Recipe, measured: Dataset, tokenizer) -> bool:
    """Check whether examples held out of one run are training examples of another; its own recipe says which are.

    Args:
        run: the one that is measured.
        rows_of: the recipe of the run that held rows out; one with data.eval held none.
        measured: those rows.
    """
    own = run.recipe
    shared = {source.path for source in own.data.train} & {source.path for source in rows_of.data.train}
    if not rows_of.data.eval_share or not shared:
        return False
    if own.data.streaming:  # what it learned is not known before it is read to the end
        return True
    try:
        trained_on = {row.where for row in build_data(own, tokenizer).examples}
        if own.data.eval_share and run.held_out not in (None, held_out_digest(build_data(own, tokenizer, "eval"))):
            return True  # the files have changed since
    except DataError:  # as where another of its files is gone
        return True
    return any(row.where in trained_on for row in measured.examples)


def _plain(tasks: Tasks, prompt: str) -> str:
    ids = tasks.tokenizer(prompt, add_special_tokens=False).input_ids
    return tasks.tokenizer.decode(ids, skip_special_tokens=True)


def _side_by_side(said: dict[str, list[dict]]) -> list[dict]:
    """Put the answers of all models to the same row together; prompt and reference are the first model's."""
    rows: dict[tuple[str, int], dict] = {}
    for name, answers in said.items():
        parts: Counter[str] = Counter()  # of a conversation that was split, by its place
        for each in answers:
            kept = {key: each[key] for key in ("where", "prompt", "question", "reference")}
            parts[each["where"]] += 1
            row = rows.setdefault((each["where"], parts[each["where"]]), kept | {"answers": {}, "matches": {}})
            row["answers"][name], row["matches"][name] = each["answer"], each["match"]
    return list(rows.values())
