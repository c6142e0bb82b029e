"""``qlora-lite evaluate``: measure a run, or a recipe's base model, on the evaluation examples."""

import json
from pathlib import Path
from typing import Any

import click

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.load import load_recipe, recipe_of

from .options import of_a_run
from .output import echo, echo_exactly, prepare, step_progress

_ROWS, _MEASURED = ("data.eval=", "data.eval."), ("train.metrics", "train.exact_match_")
_OF_A_RUN = *_ROWS, *_MEASURED
_MEASURED_NAMES = "train.metrics..., train.exact_match_..."
_LABELS = {"rows": "examples", "labelled_tokens": "target tokens"}  # how the figures are printed
_OF_AN_ADAPTER = *_OF_A_RUN, "data.max_tokens=", "data.overflow=", "data.template=", "data.train_on="


@click.command()
@click.argument("run_or_recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--base", is_flag=True, help="Leave out the run's adapter.")
@click.option("--rows", type=click.IntRange(min=0), help="Examples for exact match; default as in the recipe.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="JSONL file for the answers: prompt, reference, answer and match of each compared example.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@of_a_run
def evaluate(run_or_recipe: str, overrides: tuple[str, ...], base: bool, rows: int | None, out: Path | None,
             as_json: bool, model_path: str | None, unfinished: bool) -> None:  # fmt: skip
    """Measure loss, perplexity and exact match of RUN_OR_RECIPE: a run folder, or a recipe's base model.

    KEY=VALUE replaces a setting of a recipe. A run is measured with its own settings, of which only data.eval=PATH,
    train.metrics... and train.exact_match_... can be replaced; PATH is read with the prompt and completion templates of
    the run's own data if it has their columns. An adapter alone needs data.eval, and also takes data.max_tokens,
    overflow, template and train_on.
    """
    adapter = tokenizer = None
    if not Path(run_or_recipe).exists() and Path(run_or_recipe).suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{run_or_recipe}: no such run folder or recipe (a .yaml file)")
    if Path(run_or_recipe).is_dir():
        prepare(verbose=False)
        recipe, adapter, tokenizer = _opened(run_or_recipe, overrides, model_path, unfinished)
        adapter = None if base else adapter
    else:
        if base or model_path or unfinished:
            raise click.UsageError(
                "--base, --model and --unfinished are for a run folder; for a recipe the base model is measured, "
                "and model.path=PATH says where it is"
            )
        recipe = load_recipe(run_or_recipe, overrides)
        prepare(verbose=False)
    from qlora_lite.inference.evaluate import evaluate_recipe

    asked = recipe.train.metrics_examples if rows is None else rows
    if out and not asked:
        raise click.UsageError("--out needs examples to answer: --rows N, or train.metrics_examples=N")
    with step_progress("loading") as progress:
        result = evaluate_recipe(recipe, adapter, asked, tokenizer, out, progress.watch)
    if as_json:
        echo_exactly(json.dumps(result))
        return
    shown: dict[str, Any] = result | {"adapter": result["adapter"] or "none: the base model"}
    if "exact_match" in result:
        compared = _how_many(shown.pop("exact_match_rows"), result["rows"], asked)
        shown["exact_match"] = f"{result['exact_match']:.4f} on {compared}"
    for name, value in shown.items():
        label = _LABELS.get(name, name).replace("_", " ")
        echo(f"{label:18} {value:.4f}" if isinstance(value, float) else f"{label:18} {value}")


def _how_many(compared: int, rows: int, asked: int) -> str:
    """Return how many examples exact match is over, and how to have more, if there are more."""
    why = " (train.metrics_examples; --rows N for more)" if asked < rows else ""
    return f"{compared:,} of {rows:,} examples{why}"


def _opened(folder: str, overrides: tuple[str, ...], model_path: str | None, unfinished: bool) -> tuple:
    """Return the recipe to measure a run or an adapter alone with, its adapter, and a tokenizer if not the base's."""
    from qlora_lite.artifacts.run_folder import RECIPE, is_adapter_alone

    is_alone = is_adapter_alone(Path(folder))
    _check_overrides(folder, overrides, is_alone)
    from qlora_lite.artifacts.trained_run import open_trained

    trained = open_trained(folder, model_path, unfinished)
    (data, train), tokenizer = (trained.recipe.data, trained.recipe.train), None
    if is_alone:
        settings = {"model": {"path": trained.recipe.model.path}, "data": {"train": "no-rows"}}
        named = recipe_of(settings, overrides, folder)
        (data, train), tokenizer = (named.data, named.train), trained.tokenizer()
    elif overrides:
        from qlora_lite.prepare.datasets import with_known_columns

        names_rows = any(each.startswith(_ROWS) for each in overrides)
        held_out = ("data.eval_share=0",) if names_rows else ()
        named = load_recipe(Path(folder) / RECIPE, (*overrides, *held_out), check_files=False)
        sources = named.data.eval
        if names_rows and sources:
            sources = with_known_columns(sources, (*(data.eval or ()), *data.train))
        data = data.model_copy(update={"eval": sources, "eval_share": named.data.eval_share})
        replaced = {name: value for name, value in named.train if f"train.{name}".startswith(_MEASURED)}
        train = train.model_copy(update=replaced)
    return trained.recipe.model_copy(update={"data": data, "train": train}), trained.adapter, tokenizer


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
        raise RecipeError(f"{folder} is an adapter alone, without evaluation data; name some, as in "
                          "data.eval=rows.jsonl, or compare it with a run, on that run's data: "
                          f"qlora-lite compare RUN {folder}")  # fmt: skip
