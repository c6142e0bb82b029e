"""Find what a recipe names on this disk: data, model, template, folders.

A relative data, model, template or offload path of a recipe is looked for beside the recipe first (so that a copied
recipe works from any folder), then in the folder the program was started in; one from the command line the other way
round, since there it means what the shell shows. The output folder is always relative to the folder the program was
started in, like any program's output. Hub ids are checked by shape only: nothing here touches the network.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from difflib import get_close_matches

from qlora_lite.files import PACKAGE_PREFIX, TooManyFolders, matches, package_file

from .schema import Recipe, Source
from .strict_yaml import NOT_TEXT

Bases = tuple[str, str]  # the folders that a relative path is looked for in, the first one first
ADAPTER_FILES = "recipe.yaml", "adapter_config.json"  # one of which a run folder or an adapter's has
TEMPLATES = (
    "chatml",
    "chatml-tools",
    "llama3",
    "mistral",
    "gemma",
    "alpaca",
    "plain",
    "joined",
)  # names that data.template takes
_GLOB = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt|text|md|gz|zst)$", re.IGNORECASE)
_HUB_DATA = re.compile(r"hub:[\w.-]+/[\w.-]+(/[\w.-]+)?(:\w+)?", re.ASCII)


class PathProblem(ValueError):
    """Return what is wrong with a path, and the cure."""


def is_hub_data(path: str) -> bool:
    """Return whether a path is a hub data set's, by its shape."""
    return _HUB_DATA.fullmatch(path) is not None


def find_data(path: str, bases: Bases) -> str:
    """Return the absolute path, or glob pattern, of a data file or folder; a hub path stays as it is.

    Args:
        path: as the recipe has it; "~" is the home folder.
        bases: where to look.

    Raises:
        PathProblem: nothing is there.
    """
    if path.startswith("hub:"):
        if not is_hub_data(path):
            raise PathProblem("must be hub:OWNER/NAME, hub:OWNER/NAME/CONFIG, or one of them with :SPLIT")
        return path
    expanded = os.path.expanduser(path)
    for base in bases:
        candidate = os.path.join(base, expanded)
        if os.path.exists(candidate):
            return os.path.abspath(candidate)
        pattern = os.path.join(glob.escape(base), expanded)
        try:
            if _GLOB.search(expanded) and matches(pattern):
                return os.path.abspath(pattern)
        except TooManyFolders as error:
            raise PathProblem(str(error)) from None
    what = "no file matches this pattern" if _GLOB.search(expanded) else "no such file"
    is_id = path.count("/") == 1 and _HUB_ID.fullmatch(path) and not _DATA_FILE.search(path)
    hub = f"; a data set of the hub is hub:{path}" if is_id else ""
    raise PathProblem(f"{what}{_searched(expanded, bases)}{hub}")


def find_model(path: str, bases: Bases) -> str:
    """Return `model.path` with a local path made absolute; a hub id or package file stays as it is.

    Args:
        path: as the recipe has it.
        bases: where to look.

    Raises:
        PathProblem: it is local and not there, in a package that is not installed, or of no known shape.
    """
    if path.startswith(PACKAGE_PREFIX):
        try:
            package_file(path)
        except LookupError as error:
            raise PathProblem(error.args[0]) from None
        return path
    expanded = os.path.expanduser(path)
    for candidate in (os.path.join(base, expanded) for base in bases):
        if os.path.isdir(candidate):
            return os.path.abspath(candidate)
        if os.path.isfile(candidate):
            if not path.endswith(".gguf"):
                raise PathProblem("is a file; give the model's folder, or a .gguf file")
            return os.path.abspath(candidate)
    if path.startswith((".", "/", "~")) or path.endswith(".gguf") or os.path.isabs(path):
        raise PathProblem(f"no such model{_searched(expanded, bases)}")
    if not _HUB_ID.fullmatch(path):
        raise PathProblem("is not a hub id (owner/name), and there is no folder or .gguf file of that name")
    return path


def find_folder(path: str, bases: Bases) -> str:
    """Return the absolute path of a folder.

    Raises:
        PathProblem: it is not there, or cannot be written to.
    """
    expanded = os.path.expanduser(path)
    for candidate in (os.path.join(base, expanded) for base in bases):
        if os.path.isdir(candidate):
            if not os.access(candidate, os.W_OK | os.X_OK):
                raise PathProblem("is not writable; choose another folder")
            return os.path.abspath(candidate)
    raise PathProblem(f"no such folder{_searched(expanded, bases)}")


def find_adapter(path: str, bases: Bases) -> str:
    """Return the absolute path of a run folder or an adapter's.

    Raises:
        PathProblem: it is not there, or is neither.
    """
    expanded = os.path.expanduser(path)
    for candidate in (os.path.join(base, expanded) for base in bases):
        if os.path.isdir(candidate):
            if not any(os.path.isfile(os.path.join(candidate, name)) for name in ADAPTER_FILES):
                raise PathProblem(
                    f"is neither a run folder nor an adapter: it has neither {' nor '.join(ADAPTER_FILES)}"
                )
            return os.path.abspath(candidate)
    raise PathProblem(f"no such folder{_searched(expanded, bases)}")


def find_function(name: str, bases: Bases) -> str:
    """Return FILE.py:FUNCTION with the file's path made absolute; MODULE:FUNCTION stays as it is.

    Raises:
        PathProblem: it is neither, or the file is not there.
    """
    path, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier() or not path:
        raise PathProblem("is not a function's place; write FILE.py:FUNCTION, or MODULE:FUNCTION")
    return f"{find_data(path, bases)}:{function}" if path.endswith(".py") else name


def find_template(template: str, bases: Bases) -> str:
    """Return `data.template` with a file's path made absolute; a template's name stays as it is.

    Raises:
        PathProblem: it names a file that is not there, or is no name of a template.
    """
    if template.endswith(".jinja"):
        return find_data(template, bases)
    if template not in TEMPLATES:
        close = get_close_matches(template, TEMPLATES, 1, 0.7)
        meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(TEMPLATES)}, or a .jinja file"
        raise PathProblem(f"is not a template; {meant}")
    return template


def _searched(path: str, bases: Bases) -> str:
    if os.path.isabs(path):
        return "; correct the path"
    places = dict.fromkeys(map(os.path.abspath, bases))
    return f" in {' or '.join(places)}; put it there or correct the path"


def resolved(recipe: Recipe, bases: Callable[..., Bases], stem: str) -> Recipe:
    """Return the recipe with absolute paths and a name.

    Args:
        bases: returns where the path at a place such as "model", "path" is looked for; what is in neither folder is
            placed in the first.
        stem: the recipe file's name.
    """
    data: dict[str, object] = {"train": _absolute("train", recipe.data.train, bases)}
    if recipe.data.eval is not None:
        data["eval"] = _absolute("eval", recipe.data.eval, bases)
    if (template := recipe.data.template or "").endswith(".jinja"):
        data["template"] = _or_placed(find_template, template, bases("data", "template"))
    output = {"name": recipe.output.name or _name_of(stem)}
    if recipe.output.dir is not None:
        output["dir"] = os.path.abspath(os.path.expanduser(recipe.output.dir))
    model = {"path": _or_placed(find_model, recipe.model.path, bases("model", "path"))}
    lora, memory, objective = {}, {}, {}
    if recipe.objective.rewards:
        places = bases("objective", "rewards")
        objective["rewards"] = tuple(_or_placed(find_function, name, places) for name in recipe.objective.rewards)
    if recipe.lora.init_from is not None:
        lora["init_from"] = _or_placed(find_adapter, recipe.lora.init_from, bases("lora", "init_from"))
    if recipe.memory.offload_folder is not None:
        place = "memory", "offload_folder"
        memory["offload_folder"] = _or_placed(find_folder, recipe.memory.offload_folder, bases(*place))
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "lora": recipe.lora.model_copy(update=lora),
            "data": recipe.data.model_copy(update=data),
            "memory": recipe.memory.model_copy(update=memory),
            "objective": recipe.objective.model_copy(update=objective),
            "output": recipe.output.model_copy(update=output),
        }
    )


def _absolute(part: str, sources: tuple[Source, ...], bases: Callable[..., Bases]) -> tuple[Source, ...]:
    places = (bases("data", part, index, "path") for index in range(len(sources)))
    found = [_or_placed(find_data, source.path, place) for source, place in zip(sources, places, strict=True)]
    return tuple(s.model_copy(update={"path": path}) for s, path in zip(sources, found, strict=True))


def _or_placed(find: Callable[[str, Bases], str], path: str, bases: Bases) -> str:
    """Return what `find` returns, or the path in the first folder where it finds nothing."""
    try:
        return find(path, bases)
    except PathProblem:
        if path.startswith((PACKAGE_PREFIX, "hub:")):
            return path
        return os.path.abspath(os.path.join(bases[0], os.path.expanduser(path)))


def check_folder(folder: str) -> None:
    """Check that absolute paths under a folder can be written into a recipe.

    Raises:
        PathProblem: its name is not text.
    """
    if NOT_TEXT.search(os.path.abspath(folder)):
        raise PathProblem("the folder's name holds a character that is not text; rename the folder")


def _name_of(stem: str) -> str:
    return re.sub(r"^\W+", "", re.sub(r"[^\w.-]", "-", stem))[:50] or "run"
