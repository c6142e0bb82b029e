"""``qlora-lite recipes``: the built-in recipes, and checking one's own, without torch."""

import json

import click

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.catalog import copy_recipe, list_recipes, show_recipe
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml

from .output import echo, echo_exactly


@click.group()
def recipes() -> None:
    """List, show, copy and check recipes."""


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
    """Copy the built-in recipe NAME, with its data, to DEST (a folder or a file; default here)."""
    echo(f"wrote {copy_recipe(name, dest)}")


@recipes.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE without loading a model, and print it with every default filled in."""
    if not as_json:
        echo_exactly(resolve_to_yaml(load_recipe(recipe, overrides)), nl=False)
        return
    try:
        settings = load_recipe(recipe, overrides)
    except RecipeError as error:
        problems = [{"where": p.where, "key": p.key, "message": p.message} for p in error.problems]
        echo_exactly(json.dumps({"ok": False, "problems": problems}))
        raise click.exceptions.Exit(error.exit_code) from None
    echo_exactly(json.dumps({"ok": True, "problems": [], "recipe": settings.model_dump(mode="json")}))
