"""Read the package's source without importing it: what its files import, and where they name kinds of runs."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from qlora_lite.registry import names

PACKAGE = Path(__file__).resolve().parents[2] / "qlora_lite"
# Properties of a recipe (or of a model's head) that say what kind of run it is.
PREDICATES = {
    "generates_pictures",
    "has_masks",
    "label_problem",
    "of_pictures",
    "preference",
    "problem",
    "with_vision",
}
SETTINGS = {
    ("task", "kind"),
    ("adapter", "method"),
    ("train", "objective"),
    ("train", "merge_aware"),
    ("lora", "start"),
}
OWN = "ext/", "methods/", "tasks/"
BASES = {"ModelSpec", "Batches", "Objective", "AdapterMethod"}  # of the classes of a kind
OTHER_CLASSES = {"DenoiserModel"}  # of a kind
# Values of task.kind, adapter.method and train.objective that are not words of something else too.
WORDS = {word for group in ("tasks", "methods", "objectives") for word in names(group)} - {
    "full",
    "lora",
    "prefix",
    "prompt",
    "reward",
}


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=2000)
def imported_names(path: Path, package: Path = PACKAGE) -> tuple[str, ...]:
    """Return the absolute dotted name of everything that a file imports, wherever in the file."""
    return tuple(_imported_names(path, package))


def _imported_names(path: Path, package: Path) -> Iterator[str]:
    here = ("qlora_lite", *path.relative_to(package).with_suffix("").parts)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def import_cycles(package: Path = PACKAGE) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or by way of others, wherever the imports are."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = ("qlora_lite", *path.relative_to(package).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        names = {*imported_names(path, package)}
        graph[name] = (names | {each.rpartition(".")[0] for each in names}) & files.keys() - {name}
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return all that a module imports, directly or by way of others: itself too, where it is part of a cycle."""
    reached: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached


def named_kinds(package: Path = PACKAGE) -> dict[str, int]:
    """Return how often each module of the core names a kind of task, a method or an objective.

    The folders of ``OWN``, which tasks and methods stand in, are not of the core. A place is one of these, docstrings,
    comments and the lookup of a name in the registry apart:

    - a property of ``PREDICATES`` that is read, of whatever object;
    - a setting of ``SETTINGS`` that is read: ``recipe.task.kind``, ``task.kind``;
    - a word of ``WORDS`` as a text of its own;
    - a call of isinstance or issubclass with a class that is derived from one of ``BASES``, or of ``OTHER_CLASSES``.
    """
    counts: Counter[str] = Counter()
    bases: dict[str, set[str]] = {}  # of each class
    asked: list[tuple[str, set[str]]] = []  # a module, and the names that one of its calls of isinstance asks about
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(map(_last, node.bases))
            elif isinstance(node, ast.Call) and _last(node.func) in ("isinstance", "issubclass"):
                asked.append((name, {*map(_last, ast.walk(node.args[1]))}))
            elif isinstance(node, ast.Call) and _last(node.func) == "find" and len(node.args) == 3:
                counts[name] -= _is_named(node.args[1])
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                counts[name] += _is_named(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                counts[name] += node.value in WORDS
    classes = _derived(bases) | OTHER_CLASSES
    counts.update(name for name, names in asked if names & classes)
    return {name: count for name, count in sorted(counts.items()) if count and not name.startswith(OWN)}


def _is_named(node: ast.AST) -> bool:
    """Return whether a kind is read of an object."""
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr in PREDICATES or (_last(node.value), node.attr) in SETTINGS


def _derived(bases: dict[str, set[str]]) -> set[str]:
    """Return the names of the classes that are derived from one of ``BASES``, directly or by way of others."""
    found = set(BASES)
    while more := {name for name, of in bases.items() if of & found} - found:
        found |= more
    return found - BASES


def _last(node: ast.AST) -> str:
    """Return a name, of a dotted one its last part."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def lines_by_kind(path: Path) -> Counter[str]:
    """Return how many lines a file has in all, and of them lines of docstrings, of comments alone and of code."""
    lines = path.read_text(encoding="utf-8").splitlines()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(parse(path)) if isinstance(node, documented) and node.body]
    of_docstrings = {
        number
        for node in first
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, node.end_lineno + 1)
    }
    kinds = (
        "docstring" if number in of_docstrings else _kind_of_line(line.strip()) for number, line in enumerate(lines, 1)
    )
    return Counter(kinds) + Counter(all=len(lines))


def _kind_of_line(line: str) -> str:
    return "blank" if not line else "comment" if line.startswith("#") else "code"
