"""Find what distributions bring, the package's own features included, by name.

A distribution names what it brings in its metadata, as entry points (packaging.python.org, "Entry points
specification"): the group says the kind of thing, the name is what a recipe or a command calls it, and the value says
where it stands. So names are listed without importing anything, and a thing is imported when it is used.

    [project.entry-points."qlora_lite.forms"]
    onnx = "my_package.export:ONNX"
"""

import ast
import sys
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from typing import Any

from .errors import ExtensionError, require_one_of

KINDS = {  # -> what one is called
    "commands": "command",
    "forms": "export form",
    "methods": "method",
    "objectives": "objective",
    "tasks": "task",
}
DISTRIBUTION = "qlora-lite"


def names(kind: str) -> list[str]:
    """Return the names of all things of a kind, sorted.

    Args:
        kind: of ``KINDS``.

    Raises:
        ExtensionError: two have one name, or the package's own are missing.
    """
    return sorted(_registered(kind))


def find(kind: str, name: str, protocol: type) -> Any:
    """Import a thing and return it.

    Args:
        kind: of ``KINDS``.
        protocol: of things of that kind, which can be checked at run time.

    Raises:
        ExtensionError: it cannot be imported, or lacks a member of the protocol; see ``names``.
        ModelError: there is none of that name.
    """
    known = _registered(kind)
    require_one_of(KINDS[kind], name, sorted(known))
    entry, owner = known[name]
    what, cure = f"the {KINDS[kind]} {name} of {owner}", f"update or uninstall {owner}"
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:  # the code of others, which may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ExtensionError(f"{what} cannot be loaded ({entry.value}: {why}); {cure}") from error
    if isinstance(found, type) or not isinstance(found, protocol):
        raise ExtensionError(f"{what} is no {KINDS[kind]} ({entry.value} is no object with the members of one); {cure}")
    return found


def summary(kind: str, name: str) -> str:
    """Return the first line of the docstring of the module in which a thing stands; nothing is imported for it.

    Args:
        kind: of ``KINDS``.
        name: of ``names``.
    """
    entry, owner = _registered(kind)[name]
    with suppress(ImportError, SyntaxError, AttributeError, ValueError):  # using it says what is wrong
        return (ast.get_docstring(ast.parse(_source(entry.module))) or "").partition("\n")[0]
    return f"of {owner}, and cannot be read"


def _source(module: str) -> Any:
    """Return a module's text; ``find_spec`` alone would import the packages that it is in."""
    name, *rest = module.split(".")
    spec: Any = find_spec(name)
    for part in rest:
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec.loader.get_source(name)


def _registered(kind: str) -> dict[str, tuple[EntryPoint, str]]:
    """Return entry points by name, each with its distribution."""
    found: dict[str, tuple[EntryPoint, str]] = {}
    for each, owner in _entries(tuple(sys.path)):
        if each.group != f"qlora_lite.{kind}":
            continue
        first, known = found.setdefault(each.name, (each, owner))
        if owner != known:
            raise ExtensionError(
                f"the {KINDS[kind]} {each.name} is registered twice, by {known} ({first.value}) and by "
                f"{owner} ({each.value}); uninstall one of them"
            )
    if DISTRIBUTION not in (owner for _, owner in found.values()):
        raise ExtensionError(
            f"the package's own {KINDS[kind]}s are not registered: it is run from a clone, or was installed by an "
            "earlier version; install it again (pip install -e . in a clone)"
        )
    return found


@cache
def _entries(path: tuple[str, ...]) -> list[tuple[EntryPoint, str]]:
    """Return the entry points of all kinds on a path, with their distributions."""
    found: list[tuple[EntryPoint, str]] = []
    # not entry_points(), which reads the first distribution of each name alone: in a clone that may be an old build's
    for distribution in distributions(path=list(path)):
        if own := [each for each in distribution.entry_points if each.group.startswith("qlora_lite.")]:
            name = distribution.name  # for which the metadata is parsed
            found += [(each, name) for each in own]
    return found
