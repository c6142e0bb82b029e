"""Apply `key=value` settings from the command line to a recipe's values.

The value is read by the rules of `strict_yaml`, as if it stood in the file, and a list item is addressed by
its number from 0: `data.train.0.path=rows.jsonl`. An override that undoes another one is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qlora_lite.errors import Problem

from .schema import FORMER_NAMES
from .strict_yaml import MAX_DEPTH, Document, Node, parse, shown

_PLACE = "override {}"
_COMMENT = re.compile(r"(?![\s]*[\"'\[{])(.*\s)?#")  # of a value that is not in quotes, nor a list or a mapping


def override_number(where: str) -> int | None:
    """Return the number of the override that a place names, None for a place in a file."""
    found = re.fullmatch(_PLACE.format(r"(\d+)"), where)
    return int(found[1]) if found else None


def apply_overrides(root: Node, overrides: Sequence[str], document: Document) -> None:
    """Set values in `root`, in order; problems go to `document`.

    Args:
        root: the recipe's outermost mapping, changed in place.
        overrides: texts such as "lora.rank=32".
        document: collects what is wrong, with the place "override N".
    """
    given: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(overrides, start=1):
        place = _PLACE.format(number)
        key, equals, raw = text.partition("=")
        key = FORMER_NAMES.get(key.strip(), key)
        parts = tuple(key.strip().split("."))
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            message = f"{shown(text)} is not an override; write it like lora.rank=32"
            document.problems.append(Problem(message, place))
            continue
        undone = [earlier for path, earlier in given.items() if path[: len(parts)] == parts]
        if undone:
            message = f"{shown(key)} undoes override {undone[0]}; give only one of them"
            document.problems.append(Problem(message, place, key))
            continue
        if _COMMENT.match(raw):
            message = f"{shown(text)}: in YAML, # begins a comment; put the value in quotes: {shown(key)}='\"...\"'"
            document.problems.append(Problem(message, place, key))
            document.unreadable.add(key)
            continue
        given[parts] = number
        value = _value(raw, place, key, document)
        if value is not None:
            _set(root, parts, value, document)


def _value(raw: str, place: str, key: str, document: Document) -> Node | None:
    """Return the value of an override, or None where it is not YAML."""
    parsed = parse(raw.encode("utf-8", "surrogatepass"), place, place)
    document.problems += [Problem(problem.message, place, key) for problem in parsed.problems]
    if parsed.problems:
        document.unreadable.add(key)
        return None
    return parsed.root if parsed.root is not None else Node(None, place)


def _set(root: Node, parts: tuple[str, ...], value: Node, document: Document) -> None:
    def refuse(message: str) -> None:
        key = ".".join(parts)
        document.problems.append(Problem(f"{shown(key)}: {message}", value.where, key))

    container = root.value
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        slot: Any = part
        if isinstance(container, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(container):
                name = ".".join(parts[:depth])
                refuse(f"{name} has items 0 to {len(container) - 1}; use one of them")
                return
            slot = int(part)
        if is_last:
            container[slot] = value
            return
        child = container[slot] if isinstance(container, list) else container.get(slot)
        if child is None or child.value is None:
            child = container[slot] = Node({}, value.where)
        if not isinstance(child.value, dict | list):
            name = ".".join(parts[: depth + 1])
            refuse(f"{name} is a single value; override it as a whole, like {shown(name)}=...")
            return
        container = child.value
