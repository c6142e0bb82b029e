"""``qlora-lite evaluate``: measure a run, or a recipe's base model, on the evaluation rows."""

import json
from pathlib import Path

import click

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.load import load_recipe

from .output import prepare


@click.command()
@click.argument("run_or_recipe")
@click.option("--base", is_flag=True, help="Leave the run's adapter out.")
@click.option("--rows", type=click.IntRange(min=0), help="Rows for exact match; default as in the recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(run_or_recipe: str, base: bool, rows: int | None, as_json: bool) -> None:
    """Measure loss, perplexity and exact match of RUN_OR_RECIPE: a run folder, or a recipe's base model."""
    adapter = None
    if Path(run_or_recipe).is_dir():
        from qlora_lite.runs import open_run

        opened = open_run(run_or_recipe)
        recipe, adapter = opened.recipe, None if base else opened.adapter
    else:
        recipe = load_recipe(run_or_recipe)
    if recipe.data.eval is None:
        raise RecipeError("data.eval is not set; name the rows to evaluate on")
    prepare(verbose=False)
    from qlora_lite.evaluate import evaluate_recipe

    result = evaluate_recipe(recipe, adapter, recipe.train.exact_match_rows if rows is None else rows)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name.replace('_', ' '):18} {value:.4f}" if isinstance(value, float) else
                   f"{name.replace('_', ' '):18} {value}")  # fmt: skip
