"""``qlora-lite evaluate``: measure a run, or a recipe's base model, on the evaluation rows."""

import json
from pathlib import Path

import click

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.load import load_recipe, recipe_of

from .options import of_a_run
from .output import echo, echo_exactly, prepare

_OF_A_RUN = "data.eval=", "data.eval."
_OF_AN_ADAPTER = *_OF_A_RUN, "data.max_tokens=", "data.overflow=", "data.template=", "data.train_on="


@click.command()
@click.argument("run_or_recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--base", is_flag=True, help="Leave the run's adapter out.")
@click.option("--rows", type=click.IntRange(min=0), help="Rows for exact match; default as in the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@of_a_run
def evaluate(run_or_recipe: str, overrides: tuple[str, ...], base: bool, rows: int | None, as_json: bool,
             model_path: str | None, unfinished: bool) -> None:  # fmt: skip
    """Measure loss, perplexity and exact match of RUN_OR_RECIPE: a run folder, or a recipe's base model.

    KEY=VALUE replaces a setting of a recipe; a run is measured with its own, on its evaluation rows or on those of
    data.eval=PATH, read with the prompt and completion of the run's own rows where it has their columns. An adapter
    alone needs that, and takes data.max_tokens, overflow, template and train_on too.
    """
    adapter = tokenizer = None
    if Path(run_or_recipe).is_dir():
        prepare(verbose=False)
        recipe, adapter, tokenizer = _opened(run_or_recipe, overrides, model_path, unfinished)
        adapter = None if base else adapter
    else:
        if base or model_path or unfinished:
            raise click.UsageError(
                "--base, --model and --unfinished are for a run folder; of a recipe the base model is measured, "
                "and model.path=PATH says where it is"
            )
        recipe = load_recipe(run_or_recipe, overrides)
        prepare(verbose=False)
    from qlora_lite.evaluate import evaluate_recipe

    result = evaluate_recipe(recipe, adapter, recipe.train.exact_match_rows if rows is None else rows, tokenizer)
    if as_json:
        echo_exactly(json.dumps(result))
        return
    for name, value in (result | {"adapter": result["adapter"] or "none: the base model"}).items():
        echo(f"{name.replace('_', ' '):18} {value:.4f}" if isinstance(value, float) else
                   f"{name.replace('_', ' '):18} {value}")  # fmt: skip


def _opened(folder: str, overrides: tuple[str, ...], model_path: str | None, unfinished: bool) -> tuple:
    """Return the recipe to measure a run or an adapter alone with, its adapter, and a tokenizer if not the base's."""
    from qlora_lite.runs import RECIPE, is_adapter_alone

    is_alone = is_adapter_alone(Path(folder))
    _check_overrides(folder, overrides, is_alone)
    from qlora_lite.trained import open_trained

    trained = open_trained(folder, model_path, unfinished)
    data, tokenizer = trained.recipe.data, None
    if is_alone:
        settings = {"model": {"path": trained.recipe.model.path}, "data": {"train": "no-rows"}}
        data, tokenizer = recipe_of(settings, overrides, folder).data, trained.tokenizer()
    elif overrides:
        from qlora_lite.rows import with_known_columns

        named = load_recipe(Path(folder) / RECIPE, (*overrides, "data.eval_share=0"), check_files=False)
        sources = named.data.eval and with_known_columns(named.data.eval, (*(data.eval or ()), *data.train))
        data = data.model_copy(update={"eval": sources, "eval_share": named.data.eval_share})
    return trained.recipe.model_copy(update={"data": data}), trained.adapter, tokenizer


def _check_overrides(folder: str, overrides: tuple[str, ...], is_alone: bool) -> None:
    """Raise where a setting cannot be replaced, or the evaluation rows of an adapter alone are not named."""
    names = _OF_AN_ADAPTER if is_alone else _OF_A_RUN
    if other := next((each for each in overrides if not each.startswith(names)), None):
        if not is_alone:
            raise click.UsageError(f"of a run only data.eval=PATH can be replaced; {other} is for a recipe")
        settings = ", ".join(name[:-1] for name in _OF_AN_ADAPTER if name.endswith("="))
        raise click.UsageError(f"of an adapter alone only {settings} can be set; {other} is for a recipe")
    if is_alone and not any(each.startswith(_OF_A_RUN) for each in overrides):
        raise RecipeError(f"{folder} is an adapter alone, which names no evaluation rows; name some, as in "
                          "data.eval=rows.jsonl, or measure it beside a run, on that one's: "
                          f"qlora-lite compare RUN {folder}")  # fmt: skip
