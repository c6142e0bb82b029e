"""``qlora-lite recipes``: the built-in recipes, and checking one's own, without torch."""

import json
import shlex

import click

from qlora_lite.errors import DataError, Problem, RecipeError
from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.catalog import copy_recipe, list_recipes, show_recipe
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.recipe.schema import Recipe

from .group import ExtensibleGroup
from .output import echo, echo_exactly


@click.group(cls=ExtensibleGroup, prefix="recipes.")
def recipes() -> None:
    """List, show, copy and check recipes, or convert another trainer's file."""


@recipes.command("list")
def list_() -> None:
    """List the built-in recipes."""
    for name, summary in list_recipes():
        echo(f"{name:22} {summary}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the built-in recipe NAME."""
    echo_exactly(show_recipe(name), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("dest", required=False)
def copy(name: str, dest: str | None) -> None:
    """Copy the built-in recipe NAME, with its data.

    DEST is a folder or a file; without it, the current folder.
    """
    echo(f"wrote {copy_recipe(name, dest)}; its first lines say what it needs and how to start")


@recipes.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--full", is_flag=True, help="Print the recipe with every default filled in.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(recipe: str, overrides: tuple[str, ...], full: bool, as_json: bool) -> None:
    """Check RECIPE without loading a model.

    Reads the first row of each of its data files too.
    """
    from qlora_lite.prepare.early import check_run

    try:
        settings = load_recipe(recipe, overrides)
        check_run(settings)
        checked = _first_rows(settings)
    except RecipeError as error:
        if not as_json:
            raise
        problems = [{"where": p.where, "key": p.key, "message": p.message} for p in error.problems]
        echo_exactly(json.dumps({"ok": False, "problems": problems}))
        raise click.exceptions.Exit(error.exit_code) from None
    if as_json:
        echo_exactly(json.dumps({"ok": True, "problems": [], "recipe": settings.model_dump(mode="json")}))
    elif full:
        echo_exactly(resolve_to_yaml(settings), nl=False)
    else:
        echo(f"{'recipe':16} {recipe}: no problems")
        for source, format_name in checked:
            echo(f"{source.setting:16} {source.path} ({format_name})")
        data = shlex.join(["qlora-lite", "data", recipe, *overrides])
        echo(f"{'next':16} {data} (reads all rows, and shows the first)")


def _first_rows(settings: Recipe) -> list:
    """Return each source of a recipe with its format; those of the hub are not read.

    Raises:
        RecipeError: naming every source whose first row cannot be used.
    """
    from qlora_lite.prepare.datasets import build_sources

    task, found, problems = find_task(settings), [], []
    for part in ("train", "eval") if settings.data.eval else ("train",):
        for source in build_sources(settings, part):
            try:
                is_hub = source.path.startswith("hub:")
                read = "not read: it is on the hub" if is_hub else task.check_first_row(settings, source)
                found.append((source, read))
            except DataError as error:
                problems.append(Problem(str(error), key=source.setting))
    if problems:
        raise RecipeError(problems)
    return found
