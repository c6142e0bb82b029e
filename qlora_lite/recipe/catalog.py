"""The built-in recipes: list, show, copy.

They lie in `recipes/` at the top of the repository, where people look for them, and in `qlora_lite/recipes`
of an installed wheel (pyproject.toml maps one to the other).
"""

from __future__ import annotations

import os
import re
import shutil
from difflib import get_close_matches
from pathlib import Path

from qlora_lite.errors import OutputError, Problem, RecipeError


def recipes_folder() -> Path:
    """Return the folder of the built-in recipes."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of each built-in recipe, by name."""
    found = sorted(recipes_folder().glob("*.yaml"))
    return [(path.stem, _summary(path)) for path in found]


def show_recipe(name: str) -> str:
    """Return a built-in recipe's text.

    Raises:
        RecipeError: there is no recipe of that name.
    """
    return find_recipe(name).read_text(encoding="utf-8")


def copy_recipe(name: str, destination: str | Path | None = None) -> Path:
    """Copy a built-in recipe, with the files of ours that it names: data, rewards, the script that makes its data.

    Args:
        name: as `list_recipes` gives it.
        destination: a folder, or the file to write; None is NAME.yaml in the current folder.

    Returns:
        The recipe's copy.

    Raises:
        RecipeError: there is no recipe of that name.
        OutputError: a file is there already, or cannot be written.
    """
    source = find_recipe(name)
    target = Path(destination) if destination is not None else Path(source.name)
    if target.suffix not in (".yaml", ".yml") or target.is_dir():
        target = target / source.name
    copies = {source: target} | {source.parent / file: target.parent / file for file in _data_files(source)}
    taken = [path for original, path in copies.items() if os.path.lexists(path) and not _same(original, path)]
    if os.path.lexists(target):
        taken = [target, *(path for path in taken if path != target)]
    if taken:
        raise OutputError(f"{taken[0]} exists already; remove it, or copy to another folder")
    for original, path in copies.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, path)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot write {path}: {reason}; copy to another folder") from error
    return target


def find_recipe(name: str) -> Path:
    """Return the file of a built-in recipe.

    Raises:
        RecipeError: there is no recipe of that name.
    """
    names = [path.stem for path in sorted(recipes_folder().glob("*.yaml"))]
    wanted = name.removesuffix(".yaml")
    if wanted in names:
        return recipes_folder() / f"{wanted}.yaml"
    close = closest_recipe(wanted)
    cure = f"did you mean {close}?" if close else f"there are {', '.join(names)}"
    cure = recipe_for_every_gpu(name) or cure
    raise RecipeError(Problem(f"there is no built-in recipe {name!r}; {cure}"))


def closest_recipe(name: str) -> str | None:
    """Return the built-in recipe that a name is most like, None where it is like none."""
    names = [path.stem for path in sorted(recipes_folder().glob("*.yaml"))]
    return next(iter(get_close_matches(name, names, 1)), None)


def recipe_for_every_gpu(name: str) -> str | None:
    """Return what to say to who asks for a recipe by model and GPU memory, as llama3.1-8b-24gb once was; else None."""
    file = Path(name).name
    model = re.sub(r"-\d+gb(\.yaml)?$", "", file)
    if model == file or model not in dict(list_recipes()):
        return None
    return f"{model} is for every GPU: `qlora-lite plan {model} --gpu NAME` says what it takes on one"


def _summary(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip()


def _data_files(recipe: Path) -> list[str]:
    """Return the files below `data/` that a built-in recipe names, its comment too: rows, rewards, scripts."""
    named = re.findall(r"\bdata/[\w./-]+", recipe.read_text(encoding="utf-8"))
    return [path for path in dict.fromkeys(named) if (recipe.parent / path).is_file()]


def _same(original: Path, path: Path) -> bool:
    return path.is_file() and path.read_bytes() == original.read_bytes()
