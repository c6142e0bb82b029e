"""``qlora-lite evaluate``: measure a run, or a recipe's base model, on the evaluation examples."""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qlora_lite.errors import RecipeError
from qlora_lite.files import explain_write_errors, require_writable, write_text
from qlora_lite.recipe.load import load_recipe, recipe_of
from qlora_lite.recipe.schema import METRICS_EXAMPLES
from qlora_lite.units import format_score

from .compare import echo_models
from .options import of_a_run, shots_option
from .output import echo, echo_exactly, prepare, step_progress

_ROWS, _MEASURED = ("data.eval=", "data.eval."), ("train.metrics", "train.exact_match_")
_OF_A_RUN = *_ROWS, *_MEASURED
_MEASURED_NAMES = "train.metrics..., train.exact_match_..."
_LABELS = {"rows": "examples", "target_tokens": "target tokens"}  # how the figures are printed
_OF_AN_ADAPTER = *_OF_A_RUN, "data.max_tokens=", "data.overflow=", "data.template=", "data.train_on="


@click.command()
@click.argument("run_or_recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--base", is_flag=True, help="Leave out the run's adapter.")
@click.option("--side-by-side", is_flag=True, help="Measure a run's base model too.")
@shots_option
@click.option("--rows", type=click.IntRange(min=0), help="Examples for train.metrics; default as in the recipe.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSONL file for the answers: prompt, reference, answer and match of each compared example, of all models with "
    "--side-by-side or --shots. With --tasks, a JSON file for the scores.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME,...|FOLDER",
    help="Score tasks of lm-evaluation-harness in place of the evaluation examples; --rows N takes N examples of each.",
)
@click.option("--fewshot", type=click.IntRange(min=0), metavar="K", help="Examples in each prompt of --tasks.")
@click.option("--chat-template", "chat", is_flag=True, help="Write the prompts of --tasks in the chat template.")
@of_a_run
def evaluate(
    run_or_recipe: str,
    overrides: tuple[str, ...],
    base: bool,
    side_by_side: bool,
    shots: int,
    rows: int | None,
    out: Path | None,
    as_json: bool,
    model_path: str | None,
    unfinished: bool,
    tasks: tuple[str, ...],
    fewshot: int | None,
    chat: bool,
) -> None:
    """Measure loss, perplexity and train.metrics of RUN_OR_RECIPE: a run folder, or a recipe's base model.

    KEY=VALUE replaces a setting of a recipe. A run is measured with its own settings, of which only data.eval=PATH,
    train.metrics... and train.exact_match_... can be replaced; PATH is read with the prompt and completion templates of
    the run's own data if it has their columns. An adapter alone needs data.eval, and also takes data.max_tokens,
    overflow, template and train_on.

    With --tasks, the scores are those of lm-evaluation-harness, computed here. A FOLDER holds tasks of your own.
    """
    if tasks:
        if shots or rows == 0 or (base and side_by_side):
            raise click.UsageError("--tasks is not for --shots, --rows 0, or --base with --side-by-side")
        _score_tasks(
            run_or_recipe,
            overrides,
            tasks,
            base,
            side_by_side,
            fewshot,
            rows,
            chat,
            out,
            as_json,
            model_path,
            unfinished,
        )
        return
    if chat or fewshot is not None:
        raise click.UsageError("--fewshot and --chat-template are for --tasks")
    adapter, tokenizer, held_out, without = None, None, None, "none: the base model"
    if rows:
        overrides = *overrides, f"train.metrics_examples={rows}"
    if not Path(run_or_recipe).exists() and Path(run_or_recipe).suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{run_or_recipe}: no such run folder or recipe (a .yaml file)")
    if Path(run_or_recipe).is_dir():
        from qlora_lite.artifacts.run_folder import is_adapter_alone

        if (side_by_side or shots) and base:
            raise click.UsageError("--side-by-side and --shots measure the base model beside the run: leave out --base")
        if (side_by_side or shots) and is_adapter_alone(Path(run_or_recipe)):
            raise click.UsageError(
                f"--side-by-side and --shots are for a run folder; {run_or_recipe} is an adapter "
                f"alone: qlora-lite compare RUN {run_or_recipe}"
            )
        prepare(verbose=False)
        trained, tokenizer = _opened(run_or_recipe, overrides, model_path, unfinished)
        if side_by_side or shots:
            from qlora_lite.artifacts.trained_run import require_kind

            require_kind(trained.recipe, run_or_recipe, has_head=False)
        adapter, held_out = (None, None) if base else (trained.adapter, trained.held_out)
        if base or side_by_side or shots:
            replace(trained, adapter=adapter).require_base()
        without = "none: all weights were trained" if trained.began_as else without
        if side_by_side or shots:
            _compare(trained, shots, rows, out, as_json)
            return
        recipe = trained.recipe
    else:
        if base or side_by_side or shots or model_path or unfinished:
            raise click.UsageError(
                "--base, --side-by-side, --shots, --model and --unfinished are for a run folder; for a recipe the base "
                "model is measured, and model.path=PATH says where it is"
            )
        recipe = load_recipe(run_or_recipe, overrides)
        prepare(verbose=False)
    from qlora_lite.inference.evaluate import measure_recipe, write_answers
    from qlora_lite.prepare.task import find_task

    if out and find_task(recipe).has_head:
        raise click.UsageError(
            f"--out is for answers; what {run_or_recipe} gives to each row is written by `qlora-lite predict`"
        )
    asked = _asked(recipe, rows, out)
    with step_progress("loading") as progress:
        result, answers = measure_recipe(recipe, adapter, asked, tokenizer, out, progress.watch, held_out)
    with ExitStack() as when_printed:  # a full disk must not take the figures with it
        if out and answers:
            when_printed.callback(write_answers, out, answers)
        if as_json:
            echo_exactly(json.dumps(result))
        else:
            _echo_result(result | {"adapter": result["adapter"] or without}, asked)


def _echo_result(shown: dict[str, Any], asked: int) -> None:
    """Print what was measured, scores of so many examples among it."""
    rows = shown["rows"]
    for former in ("exact_match", "exact_match_rows"):  # which are among the metrics
        shown.pop(former, None)
    confusion, prompts = shown.pop("confusion", None), shown.pop("metrics_prompts", None)
    for name, score in shown.pop("metrics", {}).items():
        signature = f"; {score['signature']}" if "signature" in score else ""
        of = "prompts, each with all its references" if score["examples"] == prompts else f"of {rows:,} examples"
        on = f"{score['examples']:,} {of}"
        shown[name] = f"{format_score(name, score)} on {on}{signature}"
    shown |= {
        f"preference {name}" if name == "loss" else name: value for name, value in shown.pop("eval_metrics", {}).items()
    }
    for name, value in shown.items():
        label = _LABELS.get(name, name).replace("_", " ")
        echo(f"{label:22} {value:.4f}" if isinstance(value, float) else f"{label:22} {value}")
    if confusion:
        _echo_confusion(confusion)
    if 0 < asked < rows:
        echo(f"note: scores are of the first {asked:,} examples (train.metrics_examples); --rows N for more")


def _echo_confusion(confusion: dict) -> None:
    """Print how many examples of each label were given each."""
    labels, cells = confusion["labels"], [list(map(str, row)) for row in confusion["matrix"]]
    width = 2 + max(map(len, [*labels, *(cell for row in cells for cell in row)]))
    echo(f"{'label, given:':22} " + "".join(f"{label:>{width}}" for label in labels))
    for label, row in zip(labels, cells, strict=True):
        echo(f"{label:22} " + "".join(f"{cell:>{width}}" for cell in row))


def _score_tasks(
    run_or_recipe: str,
    overrides: tuple[str, ...],
    tasks: tuple[str, ...],
    base: bool,
    side_by_side: bool,
    fewshot: int | None,
    rows: int | None,
    chat: bool,
    out: Path | None,
    as_json: bool,
    model_path: str | None,
    unfinished: bool,
) -> None:
    """Score a run, its base model or a recipe's on tasks of lm-evaluation-harness."""
    is_recipe = Path(run_or_recipe).suffix in (".yaml", ".yml")
    if overrides and not is_recipe:
        raise click.UsageError(f"for --tasks of a run, no setting can be replaced; {overrides[0]} is for a recipe")
    prepare(verbose=False)
    os.environ["DISABLE_MULTIPROC"] = "1"  # or the harness starts processes, and prints that it does
    from qlora_lite.artifacts.trained_run import open_model
    from qlora_lite.inference.harness import evaluate_tasks

    template = "plain" if is_recipe and not chat else None  # a recipe's own may not be there, and is not needed
    trained = open_model(run_or_recipe, model_path, unfinished, template, overrides)
    if base:
        trained = replace(trained, name="base", adapter=None)
    elif side_by_side and not trained.adapter:
        raise click.UsageError("--side-by-side is for a run folder")
    if out:
        with explain_write_errors(out):  # now, and not when all is scored
            out.parent.mkdir(parents=True, exist_ok=True)
        require_writable(out)
    names = [name for each in tasks for name in ([each] if Path(each).exists() else each.split(","))]
    with step_progress("loading") as progress:
        result = evaluate_tasks(trained, names, fewshot, side_by_side, rows, chat, watch=progress.watch)
    with ExitStack() as when_printed:
        if out:
            when_printed.callback(write_text, out, json.dumps(result, indent=2) + "\n")
        if as_json:
            echo_exactly(json.dumps(result))
        else:
            _echo_scores(result)


def _echo_scores(result: dict) -> None:
    """Print the scores of tasks, a column for each model."""
    models = result["models"]
    rows = [(task, metric) for task, scores in models[0]["scores"].items() for metric in scores]
    cells = [[format_score("", model["scores"][task][metric]) for model in models] for task, metric in rows]
    labels = [f"{task}, {result['fewshot'].get(task, 0)}-shot: {metric}" for task, metric in rows]
    left = 2 + max(map(len, labels))
    widths = [2 + max(map(len, column)) for column in zip([model["name"] for model in models], *cells, strict=True)]
    for label, row in zip(["", *labels], [[model["name"] for model in models], *cells], strict=True):
        echo(f"{label:{left}}" + "".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def _asked(recipe, rows: int | None, out: Path | None) -> int:
    """Return how many examples are answered."""
    asked = 0 if rows == 0 else recipe.train.metrics_examples
    if out and not asked:
        raise click.UsageError("--out needs examples to answer: --rows N, or train.metrics_examples=N")
    return asked


def _compare(trained, shots: int, rows: int | None, out: Path | None, as_json: bool) -> None:
    """Measure a run beside its base model, and beside that with examples in its prompt."""
    from qlora_lite.inference.compare import compare_runs
    from qlora_lite.inference.evaluate import check_out, write_answers

    _asked(trained.recipe, rows, out)
    if out:
        check_out(out, trained.recipe)
    with step_progress("loading") as progress:
        result = compare_runs([trained], True, rows, watch=progress.watch, shots=shots)
    with ExitStack() as when_printed:
        if out:
            when_printed.callback(write_answers, out, result["answers"])
        if as_json:
            echo_exactly(json.dumps(result))
        else:
            echo_models(result)


def _opened(folder: str, overrides: tuple[str, ...], model_path: str | None, unfinished: bool) -> tuple:
    """Return a run or an adapter alone with the recipe to measure it with, and a tokenizer if not the base's."""
    from qlora_lite.artifacts.run_folder import RECIPE, is_adapter_alone

    is_alone = is_adapter_alone(Path(folder))
    _check_overrides(folder, overrides, is_alone)
    from qlora_lite.artifacts.trained_run import open_trained

    trained = open_trained(folder, model_path, unfinished, has_head=None)
    (data, train), tokenizer = (trained.recipe.data, trained.recipe.train), None
    if is_alone:
        settings = {"model": {"path": trained.recipe.model.path}, "data": {"train": "no-rows"}}
        named = recipe_of(settings, overrides, folder)
        (data, train), tokenizer = (named.data, named.train), trained.tokenizer()
    elif overrides:
        from qlora_lite.prepare.datasets import with_known_columns

        if not train.metrics_examples and any(each.startswith("train.metrics=") for each in overrides):
            overrides = f"train.metrics_examples={METRICS_EXAMPLES}", *overrides  # which may say another number
        names_rows = any(each.startswith(_ROWS) for each in overrides)
        held_out = ("data.eval_share=0",) if names_rows else ()
        named = load_recipe(Path(folder) / RECIPE, (*overrides, *held_out), check_files=False)
        sources = named.data.eval
        if names_rows and sources:
            sources = with_known_columns(sources, (*(data.eval or ()), *data.train))
        data = data.model_copy(update={"eval": sources, "eval_share": named.data.eval_share})
        replaced = {name: value for name, value in named.train if f"train.{name}".startswith(_MEASURED)}
        train = train.model_copy(update=replaced)
    return replace(trained, recipe=trained.recipe.model_copy(update={"data": data, "train": train})), tokenizer


def _check_overrides(folder: str, overrides: tuple[str, ...], is_alone: bool) -> None:
    """Raise where a setting cannot be replaced, or the evaluation data of an adapter alone is not named."""
    names = _OF_AN_ADAPTER if is_alone else _OF_A_RUN
    if other := next((each for each in overrides if not each.startswith(names)), None):
        if not is_alone:
            raise click.UsageError(
                f"for a run, only data.eval=PATH, {_MEASURED_NAMES} can be replaced; {other} is for a recipe"
            )
        settings = ", ".join([*(name[:-1] for name in _OF_AN_ADAPTER if name.endswith("=")), _MEASURED_NAMES])
        raise click.UsageError(f"for an adapter alone, only {settings} can be set; {other} is for a recipe")
    if is_alone and not any(each.startswith(_ROWS) for each in overrides):
        raise RecipeError(
            f"{folder} is an adapter alone, without evaluation data; name some, as in "
            "data.eval=rows.jsonl, or compare it with a run, on that run's data: "
            f"qlora-lite compare RUN {folder}"
        )
