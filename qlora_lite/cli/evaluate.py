"""``qlora-lite evaluate``: measure a run, or a recipe's base model, on the evaluation rows."""

import json
from pathlib import Path

import click

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.load import load_recipe

from .options import of_a_run
from .output import prepare


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
    data.eval=PATH.
    """
    adapter = None
    if Path(run_or_recipe).is_dir():
        if other := next((each for each in overrides if not each.startswith(("data.eval=", "data.eval."))), None):
            raise click.UsageError(f"of a run only data.eval=PATH can be replaced; {other} is for a recipe")
        prepare(verbose=False)
        from qlora_lite.runs import RECIPE
        from qlora_lite.trained import open_trained

        trained = open_trained(run_or_recipe, model_path, unfinished)
        if trained.is_alone:
            raise RecipeError(f"{run_or_recipe} is an adapter alone, which names no evaluation rows; measure it beside "
                              f"a run, on that one's: qlora-lite compare RUN {run_or_recipe}")  # fmt: skip
        instead = (*overrides, "data.eval_share=0") if overrides else ()
        named = load_recipe(Path(run_or_recipe) / RECIPE, instead, check_files=False)
        measured_on = {"eval": named.data.eval, "eval_share": named.data.eval_share}
        data = trained.recipe.data.model_copy(update=measured_on)
        recipe, adapter = trained.recipe.model_copy(update={"data": data}), None if base else trained.adapter
    else:
        if base or model_path or unfinished:
            raise click.UsageError(
                "--base, --model and --unfinished are for a run folder; of a recipe the base model is measured, "
                "and model.path=PATH says where it is"
            )
        recipe = load_recipe(run_or_recipe, overrides)
        prepare(verbose=False)
    from qlora_lite.evaluate import evaluate_recipe

    result = evaluate_recipe(recipe, adapter, recipe.train.exact_match_rows if rows is None else rows)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in (result | {"adapter": result["adapter"] or "none: the base model"}).items():
        click.echo(f"{name.replace('_', ' '):18} {value:.4f}" if isinstance(value, float) else
                   f"{name.replace('_', ' '):18} {value}")  # fmt: skip
