"""Render a chat template with words that cannot be looked at: the proof that ``fast_render`` builds on.

They can be written, joined and stripped. Questions that some templates ask, such as whether they contain "</think>",
are answered with no and noted. Anything else that can be done with text raises an error.

What joins texts out of sight (``~``, macros, set blocks) is refused before, because what comes of it is ordinary text
again; so are filters and tests that read text by other ways than its methods. The text must be the one that
transformers writes: this environment does what its own does, but is not the same.

source: Jinja's documentation, "The Sandbox"; transformers.utils.chat_template_utils for the names that it adds.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Self

from jinja2 import TemplateError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .row_formats import ROW_DAY

_LEFT, _RIGHT = "\u2002", "\u2003"  # white space that no template writes; without it, the words were stripped
WRITTEN = re.compile(f"({_LEFT}?)qzx([0-9]+)xzq({_RIGHT}?)")
_OUT_OF_SIGHT = (
    nodes.Concat,
    nodes.AssignBlock,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.Macro,
    nodes.Block,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
)
_FILTERS = (
    "trim",
    "string",
    "length",
    "count",
    "first",
    "last",
    "list",
    "default",
    "d",
    "reverse",
    "selectattr",
    "rejectattr",
    "upper",
    "lower",
    "capitalize",
)
_TESTS = (
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "number",
    "boolean",
    "true",
    "false",
    "eq",
    "==",
    "equalto",
    "ne",
    "!=",
)


class LookedAtError(TemplateError):
    """Say that a template did more with words than write them."""


def unseen(index: int) -> str:
    """Return the words of a turn, as WRITTEN finds them again in a text."""
    return f"{_LEFT}qzx{index}xzq{_RIGHT}"


def render_blind(
    source: str, messages: Sequence[dict], special_tokens: Mapping[str, object], add_generation_prompt: bool
) -> tuple[str, list]:
    """Return the rendering of messages whose contents are ``unseen``, and the questions about them, as JSON takes them.

    Raises:
        LookedAtError, another TemplateError, or one of ``probe.FAULTS``: it cannot be made.
    """
    asked: list[list] = []
    messages = [message | {"content": _Words(message["content"], asked)} for message in messages]
    text = _compiled(source).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special_tokens
    )
    return text, asked


@lru_cache(maxsize=8)
def _compiled(source: str):
    environment = _Environment()
    tree = environment.parse(source)
    if tree.find(_OUT_OF_SIGHT) or any(map(_searches_text, tree.find_all(nodes.Compare))):
        raise LookedAtError
    if _LEFT in source or _RIGHT in source:
        raise LookedAtError
    return environment.from_string(source)


def _searches_text(comparison: nodes.Compare) -> bool:
    """Return whether words could be looked for in a text of the template, which they would not notice."""
    constant = isinstance(comparison.expr, nodes.Const)
    return any(
        operand.op in ("in", "notin") and not constant and not isinstance(operand.expr, nodes.List | nodes.Tuple)
        for operand in comparison.ops
    )


def _look(*_: object, **__: object) -> None:
    raise LookedAtError


class _Words(str):
    """Hold words that can be written, joined and stripped, and nothing else.

    Args:
        asked: gets the questions about the words of one turn.
    """

    __slots__ = ("_asked",)

    def __new__(cls, text: str, asked: list[list]) -> Self:
        words = super().__new__(cls, text)
        words._asked = asked
        return words

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True  # rows with blank turns are refused when they are read

    def __add__(self, other: str) -> Self:
        return _Words(str.__add__(self, other), self._asked)

    def __radd__(self, other: str) -> Self:
        return _Words(str.__add__(other, self), self._asked)

    def __contains__(self, text: str) -> bool:
        return self._no("in", text)

    def startswith(self, text: str) -> bool:
        return self._no("startswith", text)

    def endswith(self, text: str) -> bool:
        return self._no("endswith", text)

    def strip(self, letters: str | None = None) -> Self:
        return self.lstrip(letters).rstrip(letters)

    def lstrip(self, letters: str | None = None) -> Self:
        if letters is None:
            return _Words(str.lstrip(self), self._asked)
        self._no("lstrip", letters)
        return self

    def rstrip(self, letters: str | None = None) -> Self:
        if letters is None:
            return _Words(str.rstrip(self), self._asked)
        self._no("rstrip", letters)
        return self

    def _no(self, question: str, text: str) -> bool:
        written = WRITTEN.fullmatch(str.__str__(self))
        if written is None or type(text) is not str or ASKS[question](written[0], text):
            raise LookedAtError
        self._asked.append([int(written[2]), bool(written[1]), bool(written[3]), question, text])
        return False


def _begins_with_one_of(words: str, letters: str) -> bool:
    return words[:1] in letters


def _ends_with_one_of(words: str, letters: str) -> bool:
    return words[-1:] in letters


ASKS: dict[str, Callable[[str, str], bool]] = {
    "in": str.__contains__,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "lstrip": _begins_with_one_of,
    "rstrip": _ends_with_one_of,
}
_KEPT = {*vars(_Words), *dir(object)} - {
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__hash__",
    "__repr__",
    "__format__",
}
for _name in {*dir(str), "__html__"} - _KEPT:
    setattr(_Words, _name, _look)


class _Generation(ext.Extension):
    """Write what stands in {% generation %}, as if the block were not there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Render as transformers does, without what could look at words by other ways than their methods."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        self.filters = {name: kept if name in _FILTERS else _look for name, kept in self.filters.items()}
        always = {"iterable": _is_iterable, "sequence": _is_iterable}
        self.tests = {name: kept if name in _TESTS else _look for name, kept in self.tests.items()} | always
        self.globals |= {"raise_exception": _refuse, "strftime_now": ROW_DAY.strftime}

    def call(self, context, function, *values: object, **named: object) -> object:
        """Call a function, with nothing but plain values."""
        given = [*values, *(value for name, value in named.items() if not name.startswith("_"))]
        if any(type(value) not in (str, int, bool, type(None)) for value in given):
            raise LookedAtError
        return super().call(context, function, *values, **named)


def _is_iterable(value: object) -> bool:
    return isinstance(value, str | list | tuple | dict)


def _refuse(message: str) -> None:
    raise TemplateError(message)
