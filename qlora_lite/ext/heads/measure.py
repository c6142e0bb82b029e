"""Measure a model with a head: its scores, in training and by itself."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qlora_lite.adapters.files import load_adapter
from qlora_lite.data.checks.metrics import Score
from qlora_lite.data.labels import ONE_LABEL
from qlora_lite.inference.evaluate import watching
from qlora_lite.prepare.datasets import build_data, warn_of_other_rows
from qlora_lite.prepare.job import build_workload
from qlora_lite.prepare.model import build_to_use
from qlora_lite.prepare.moment import DURING, Measured, Moment, Watch
from qlora_lite.prepare.settings import train_settings
from qlora_lite.prepare.task import find_task, name_labels
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.step import evaluate_loss
from qlora_lite.train.workload import Workload
from qlora_lite.units import counted

from .loss import outputs_for
from .metrics import confusion, scores_of

MAX_SHOWN = 30  # labels of a confusion matrix that a report shows
Scores = tuple[dict[str, Score], list[list[int]] | None]  # and of one label the confusion matrix
Scorer = Callable[[Workload, nn.Module, Iterable], Scores]  # of a model on batches


def score_labels(workload: Workload, model: nn.Module, batches: Iterable) -> Scores:
    """Return the scores of a model on batches of labelled examples."""
    outputs, there = (each.numpy() for each in outputs_for(workload, model, batches))
    matrix = None
    if workload.objective.name == ONE_LABEL and len(workload.batches.labels) <= MAX_SHOWN:
        matrix = confusion(outputs.argmax(1), there, len(workload.batches.labels)).tolist()
    return scores_of(outputs, there, workload.objective.name), matrix


def head_metrics(moment: Moment, score: Scorer = score_labels) -> Measured | None:
    """Return the scores of a run's model on all evaluation rows; note the confusion matrix in its summary."""
    trainer, data = moment.trainer, moment.eval_data
    if data is None:
        return None
    work = trainer.workload.plain()
    with moment.at_once():
        scores, matrix = trainer.computed(data.examples, lambda _, batches: score(work, trainer.model, batches))
    result = Measured(scores)
    if matrix is not None and moment.when != DURING:
        known = moment.summary.get("confusion", {"labels": list(work.batches.labels)})
        moment.record(confusion=known | {moment.when: matrix})
    moment.log_scores(result, counted(len(data.examples), "example"))
    return result


def evaluate_head(
    recipe: Recipe,
    adapter: Path | None,
    reader,
    watch: Watch | None,
    held_out: str | None,
    score: Scorer | None = score_labels,
) -> tuple[dict[str, Any], tuple[()]]:
    """Measure a recipe's model with its head on its evaluation rows, see ``inference.evaluate.evaluate_recipe``.

    Args:
        score: None measures what the objective does, and no labels.
    """
    data = build_data(recipe, reader, "eval")
    assert data is not None
    warn_of_other_rows(recipe, data, held_out)
    if recipe.task.labels is None:  # of a recipe, whose rows say them
        recipe = name_labels(recipe, build_data(recipe, reader))
    model, work = load_head(recipe, adapter, reader)
    work.check_examples(model, data.examples)
    settings = train_settings(recipe)
    watched = watching(watch, "evaluation", len(data.examples))
    result = evaluate_loss(work, model, eval_batches(work, data.examples, settings, watched))
    found = {"adapter": str(adapter) if adapter else None, "rows": len(data.examples), "eval_loss": result.loss}
    if score is None:
        return found | {"eval_metrics": dict(result.metrics)}, ()
    scores, matrix = score(work, model, eval_batches(work, data.examples, settings))
    confused = {"confusion": {"labels": list(work.batches.labels), "matrix": matrix}} if matrix else {}
    return found | {"metrics": {name: each.as_dict() for name, each in scores.items()}, **confused}, ()


def load_head(recipe: Recipe, adapter: str | Path | None, tokenizer) -> tuple[nn.Module, Workload]:
    """Load a recipe's model with its head for use, with an adapter if one is given.

    Args:
        recipe: with the names of its labels.
    """
    model = build_to_use(recipe, [Path(adapter)] if adapter else [])
    if adapter:
        load_adapter(model, adapter)
    work = build_workload(recipe, find_task(recipe).spec_type()(model.config)).read_by(tokenizer)
    work.spec.check_forward(model, recipe.data.max_tokens, work.batches)
    return model, work
