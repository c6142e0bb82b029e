"""Fill in a form instead of rendering every row, where the template is proven to give the same text.

Most chat templates only write what turns say: they do not compare, search or cut it. The text is then the template's
own words with the turns' words between them, and where those stand depends on the sequence of roles alone. So one
rendering per sequence, with all that ``render.render`` checks, is a form that every row with this sequence fills in:
no Jinja per row, and no rendering of the prefix of each answer, which grows with the square of the turns.

The proof is a rendering with words that cannot be looked at. They can be written, joined and stripped. Questions that
some templates ask, such as whether they contain "</think>", are answered with no and noted. Anything else that can be
done with text raises an error. So a rendering that ends was made without a branch taken, or a text cut, for what the
words say, and is the same for all words of which the answers are no. What has no form, or does not fit it, is rendered
row by row. (Comparing the renderings of a few texts, the other known way, is no proof: a template that looks for
"/no_think" passes.)

What joins texts out of sight (``~``, macros, set blocks) is refused before, because what comes of it is ordinary text
again; so are filters and tests that read text by other ways than its methods. The text must be the one that
transformers writes: this environment does what its own does, but is not the same. A template that is none of the named
ones is rendered by ``probe``'s process here too: within limits, whatever chance or the words have it do.

With ``tokenise`` and ``mask.mark_rows`` it halves the time that chats take row by row (tools/results/chats.json); alone
it saves a quarter of it for one question and answer, and more the more turns there are.

source: Jinja's documentation, "The Sandbox"; transformers.utils.chat_template_utils for the names that it adds.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain
from typing import Self

from jinja2 import TemplateError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_lite.errors import DataError

from .probe import FAULTS, TakesTooMuchError, render_apart
from .render import GENERATION_BLOCK, ROW_DAY, Rendering, check_no_control_tokens, render, render_turns
from .row_formats import Conversation, Turn, as_message
from .template import NAMED_TEMPLATES, Template

_LEFT, _RIGHT = "\u2002", "\u2003"  # white space that no template writes; without it, the words were stripped
WRITTEN = re.compile(f"({_LEFT}?)qzx([0-9]+)xzq({_RIGHT}?)")
_STRIPPED: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}
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

Question = tuple[int, Callable[[str], str], Callable[[str, str], bool], str]  # turn, how it is stripped, what, of what
_Place = tuple[int, int]  # contents before it, characters of the template's own text before it


@dataclass(frozen=True, slots=True)
class Form:
    """Hold what a template writes for a sequence of roles.

    Args:
        own: the template's own texts, one more than ``contents``.
        contents: for each place between them, the index of the turn that stands there, and how its words are stripped.
        answers: turn index of every answer that could be found -> its begin and end.
        questions: what the template asks about turns' words; the form is for rows where all answers are no.
    """

    own: tuple[str, ...]
    contents: tuple[tuple[int, Callable[[str], str]], ...]
    answers: dict[int, tuple[_Place, _Place]]
    questions: tuple[Question, ...]

    def fits(self, turns: tuple[Turn, ...], answers: Iterable[int]) -> bool:
        """Return whether turns with the roles that the form was made for can be filled in, and these answers found."""
        return all(index in self.answers for index in answers) and not any(
            ask(stripped(turns[index].content), text) for index, stripped, ask, text in self.questions
        )

    def fill(self, template: Template, turns: tuple[Turn, ...], answers: Iterable[int]) -> Rendering:
        """Return what ``render.render`` returns for turns that fit.

        Args:
            template: the one that the form was made of.
            turns: with the roles that the form was made for.
            answers: the indices of the answers to find.

        Raises:
            DataError: a turn holds a control token as text.
        """
        check_no_control_tokens(template, turns)
        words = [stripped(turns[index].content) for index, stripped in self.contents]
        text = "".join(chain.from_iterable(zip(self.own, [*words, ""], strict=True)))
        before = list(accumulate(map(len, words), initial=0))
        found = {}
        for index in answers:
            (contents, begin), (contents_to_end, end) = self.answers[index]
            found[index] = before[contents] + begin, before[contents_to_end] + end
        return Rendering(text, found)


def make_form(template: Template, conversation: Conversation) -> Form | None:
    """Make the form for conversations with the roles of this one; None if there is no proof that it fits any.

    Args:
        template: how to write.
        conversation: supplies the roles; its words do not matter.
    """
    if conversation.tools or any(turn.role == "tool" or turn.calls for turn in conversation.turns):
        return None
    turns = tuple(replace(turn, content=unseen(index)) for index, turn in enumerate(conversation.turns))
    answers, asked = {}, []
    try:
        text = _blind_text(template, turns, False, asked)
        for index in (index for index, turn in enumerate(turns) if turn.role == "assistant"):
            if span := _span(template, turns, text, index, asked):
                answers[index] = span
    except (LookedAtError, TemplateError, DataError, *FAULTS):
        return None
    written = list(WRITTEN.finditer(text))
    ends = [0, *chain.from_iterable(match.span() for match in written), len(text)]
    own = tuple(text[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True))
    contents = tuple((int(match[2]), _stripping(match)) for match in written)
    places = {index: (_place(begin, written), _place(end, written)) for index, (begin, end) in answers.items()}
    return Form(own, contents, places, tuple(dict.fromkeys(asked)))


def _span(
    template: Template, turns: tuple[Turn, ...], text: str, index: int, asked: list[Question]
) -> tuple[int, int] | None:
    """Return the characters of an answer; None if ``render`` must find them, or explain to each row what is wrong.

    Where a text does not begin with the prompt, that of other words may: those that the prompt itself begins to write.
    """
    try:
        span = render(template, Conversation(turns, ""), [index]).answers[index]
    except DataError:
        return None
    if not text.startswith(_blind_text(template, turns[:index], True, asked)):
        return None
    if not GENERATION_BLOCK.search(template.source):
        _blind_text(template, turns[: index + 1], False, asked)
    return span


def _place(place: int, written: list[re.Match[str]]) -> _Place:
    before = [match for match in written if match.end() <= place]
    return len(before), place - sum(len(match[0]) for match in before)


class LookedAtError(TemplateError):
    """Say that a template did more with words than write them."""


def unseen(index: int) -> str:
    """Return the words of a turn, as WRITTEN finds them again in a text."""
    return f"{_LEFT}qzx{index}xzq{_RIGHT}"


def _stripping(written: re.Match[str]) -> Callable[[str], str]:
    """Return what a template did to words before it wrote them."""
    return _STRIPPED[bool(written[1]), bool(written[3])]


def _blind_text(template: Template, turns: tuple[Turn, ...], add_generation_prompt: bool, asked: list[Question]) -> str:
    """Return transformers' rendering of turns, if it is made without a look at their words.

    Args:
        template: how to write.
        turns: each with the words that ``unseen`` gives.
        add_generation_prompt: whether to write what stands before an answer that is asked for.
        asked: gets the questions about words that were answered with no.

    Raises:
        LookedAtError, TemplateError, DataError, or one of ``probe.FAULTS``: it is not.
    """
    messages, special_tokens = [as_message(turn) for turn in turns], template.tokenizer.special_tokens_map
    options = {"add_generation_prompt": add_generation_prompt}
    try:
        if template.source in NAMED_TEMPLATES.values():
            text, questions = render_blind(template.source, messages, special_tokens, **options)
        else:
            text, questions = render_apart(template.source, messages, special_tokens, blind=True, **options)
    except TakesTooMuchError:
        raise LookedAtError from None
    if template.begin + text != render_turns(template, turns, add_generation_prompt):
        raise LookedAtError
    asked += [(turn, _STRIPPED[left, right], _ASKS[name], of) for turn, left, right, name, of in questions]
    return template.begin + text


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
        if written is None or type(text) is not str or _ASKS[question](written[0], text):
            raise LookedAtError
        self._asked.append([int(written[2]), bool(written[1]), bool(written[3]), question, text])
        return False


def _begins_with_one_of(words: str, letters: str) -> bool:
    return words[:1] in letters


def _ends_with_one_of(words: str, letters: str) -> bool:
    return words[-1:] in letters


_ASKS: dict[str, Callable[[str, str], bool]] = {
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
