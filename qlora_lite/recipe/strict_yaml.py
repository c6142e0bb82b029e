"""Read the subset of YAML that a recipe needs, with the place of every value, and write it back.

PyYAML's own loaders follow YAML 1.1 and surprise people: 1e-5 is text, 012 is 10, 3:30 is 210, NO is false,
and of two equal keys the first is lost. Here the events of its parser become values by these rules:

- true, false, null (also ~ and nothing at all) and numbers are what they look like; `1e-5` and `2e4` are
  numbers (`2e4`, being whole, also fits a whole-number setting);
- everything else is text: yes, NO, on, 012, 0x10, 1_000, 3:30, 2024-01-01, .nan, .inf, whole numbers over 18
  digits. A typed setting then refuses it by name, and no value silently becomes another;
- quoted text is always text;
- a key twice, anchors, aliases, merge keys (<<), tags (!x), more than one document, more than MAX_DEPTH
  levels or MAX_BYTES bytes, control characters and anything but UTF-8 without a byte-order mark are problems.

Aliases are refused before anything is expanded, so a "billion laughs" file costs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from qlora_lite.errors import Problem

MAX_BYTES = 64 * 1024
MAX_DEPTH = 12
_CONSTANTS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.title(), word.upper())
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]{1,4})?")
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Node:
    """Hold one value and its place.

    Args:
        value: text, number, truth value, None, a dict of Nodes, or a list of Nodes.
        where: "file.yaml:7" or "override 1"; for a value in a mapping, the line of its key.
        text: a scalar as the file has it, without quotes.
        quoted: whether the file has it in quotes.
    """

    value: Any
    where: str
    text: str = ""
    quoted: bool = False


@dataclass(slots=True)
class Document:
    """Hold what a text says and what is wrong with it.

    Args:
        root: the outermost value, or None where nothing could be read.
        problems: in the order of the text.
        unreadable: dotted keys whose value was refused, so that they are not called missing as well.
    """

    root: Node | None = None
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)


def scalar_value(text: str) -> str | int | float | bool | None:
    """Return what an unquoted scalar means; see the module's rules."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and math.isfinite(number := float(text)):
        whole = "." not in text and number.is_integer() and abs(number) < 10**15
        return int(number) if whole else number
    return text


def plain(node: Node) -> Any:
    """Return a node's value without the places: dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def parse(raw: bytes, name: str, place: str = "") -> Document:
    """Read one YAML document.

    Args:
        raw: the bytes of the file or value.
        name: how the file is named in messages; places are "name:line".
        place: a fixed place to use instead, such as "override 1".

    Returns:
        The values and every problem; a syntax error ends the reading, other problems do not.
    """
    document = Document()
    text = _decode(raw, place or name, document)
    if text is not None:
        _Reader(text, name, place, document).read()
    return document


def _decode(raw: bytes, where: str, document: Document) -> str | None:
    if len(raw) > MAX_BYTES:
        message = f"is too large for a recipe; the limit is {MAX_BYTES:,} bytes"
    elif raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        message = "starts with a byte-order mark; save it as UTF-8 without one"
    else:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            message = f"line {line} is not UTF-8; save it as UTF-8"
    document.problems.append(Problem(message, where))
    return None


class _Stop(Exception):
    """End the reading after a problem that leaves nothing more to understand."""


class _Reader:
    """Turn parser events into Nodes, by recursion that MAX_DEPTH bounds."""

    def __init__(self, text: str, name: str, place: str, document: Document) -> None:
        self._name, self._place, self._document = name, place, document
        self._events = self._safe_events(text)

    def read(self) -> None:
        try:
            for event in self._events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if self._document.root is not None:
                        self._note(event, "a second document starts here; a recipe is one document")
                        return
                    self._document.root = self._node(next(self._events), (), 0)
        except _Stop:
            return

    def _where(self, mark: yaml.Mark | None) -> str:
        if self._place:
            return self._place
        return f"{self._name}:{mark.line + 1}" if mark is not None else self._name

    def _note(self, event: yaml.Event, message: str, key: str = "") -> None:
        self._document.problems.append(Problem(message, self._where(event.start_mark), key))

    def _safe_events(self, text: str) -> Iterator[yaml.Event]:
        """Yield the events; a syntax error becomes a problem."""
        try:
            yield from yaml.parse(text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            where = self._place or f"{self._name}:{line}"
            message = f"the character U+{ord(text[error.position]):04X} is not allowed; remove it"
            self._document.problems.append(Problem(message, where))
            raise _Stop from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._document.problems.append(Problem(_syntax_message(error), self._where(mark)))
            raise _Stop from None
        except (ValueError, OverflowError):  # PyYAML 6.0: chr() of an escape beyond U+10FFFF, "\UFFFFFFFF"
            message = 'an escape such as "\\U..." is not a character; correct it'
            self._document.problems.append(Problem(message, self._place or self._name))
            raise _Stop from None

    def _node(self, event: yaml.Event, path: tuple[str, ...], depth: int) -> Node | None:
        """Return the value that starts with `event`, or None where it is refused."""
        if depth > MAX_DEPTH:
            self._note(event, f"nested more than {MAX_DEPTH} levels deep; a recipe needs 4")
            raise _Stop
        refusal = _refusal(event)
        if refusal:
            self._note(event, refusal, ".".join(path))
            self._document.unreadable.add(".".join(path))
        where = self._where(event.start_mark)
        if isinstance(event, yaml.MappingStartEvent):
            node = Node(self._mapping(path, depth), where)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(self._sequence(path, depth), where)
        elif isinstance(event, yaml.ScalarEvent):
            quoted = event.style is not None
            value = event.value if quoted else scalar_value(event.value)
            node = Node(value, where, event.value, quoted)
        else:
            return None  # an alias, already noted
        return None if refusal else node

    def _mapping(self, path: tuple[str, ...], depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = event.value if isinstance(event, yaml.ScalarEvent) else None
            here = (*path, key if key is not None else "?")
            refusal = _refusal(event) or _key_refusal(event)
            if refusal:
                self._note(event, refusal, ".".join(here))
                if key is None:
                    self._skip(event, here, depth)
            node = self._node(next(self._events), here, depth + 1)
            if refusal or key is None or node is None:
                continue
            if key in found:
                first = found[key].where
                message = f"{'.'.join(here)} is given twice, first at {first}; keep one"
                self._note(event, message, ".".join(here))
            else:
                found[key] = Node(node.value, self._where(event.start_mark), node.text, node.quoted)
        return found

    def _skip(self, event: yaml.Event, path: tuple[str, ...], depth: int) -> None:
        """Read over a key that is a mapping or a list."""
        if isinstance(event, yaml.MappingStartEvent):
            self._mapping(path, depth + 1)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._sequence(path, depth + 1)

    def _sequence(self, path: tuple[str, ...], depth: int) -> list[Node]:
        items: list[Node | None] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, str(len(items))), depth + 1))
        return [item for item in items if item is not None]


def _refusal(event: yaml.Event) -> str | None:
    """Return why an event is refused wherever it stands, or None."""
    if isinstance(event, yaml.AliasEvent):
        return f"*{event.anchor} is an alias, which is not allowed; write the value out, or put it in quotes"
    if event.anchor is not None:
        return f"&{event.anchor} is an anchor, which is not allowed; remove it, or put the value in quotes"
    if event.tag is not None:
        return f"the tag {shown(event.tag)} is not allowed; remove it, or put the value in quotes"
    if isinstance(event, yaml.ScalarEvent) and (bad := NOT_TEXT.search(event.value)):
        return f"the value holds the character U+{ord(bad[0]):04X}, which is not text; remove it"
    return None


def _key_refusal(event: yaml.Event) -> str | None:
    """Return why an event cannot be a key, or None."""
    if not isinstance(event, yaml.ScalarEvent):
        return "a key must be the name of a setting, not a list or mapping; put text with { or [ in quotes"
    if event.value == "<<" and event.style is None:
        return "merge keys (<<) are not allowed; write the settings out"
    return None


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    """Return one line for a syntax error, with the cure where it is a common one."""
    problem = " ".join(part for part in (error.context, error.problem) if part)
    message = f"not YAML: {problem}"
    if "'\\t'" in problem:
        return f"{message}; indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return f"{message}; put text with ': ' in quotes, and check the indentation"
    if "escape" in problem:
        return f"{message}; in double quotes \\ begins an escape: use single quotes, or / in a path"
    if "cannot start any token" in problem or "undefined tag handle" in problem:
        return f"{message}; put the value in quotes"
    return f"{message}; check indentation, quotes and brackets"


def shown(value: object, limit: int = 60) -> str:
    """Return a value as one short printable line for a message."""
    text = value if isinstance(value, str) else repr(value)
    if not text.isprintable() or text == "" or text != text.strip():
        text = repr(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Dumper(yaml.SafeDumper):
    """Write plain values so that `parse` reads the same ones back."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = None if scalar_value(text) == text and "\n" not in text else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def dump(values: object) -> str:
    """Write dicts, lists and scalars as YAML that `parse` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
