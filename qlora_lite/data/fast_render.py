"""Fill in a form instead of rendering every row, where the template is proven to give the same text.

Most chat templates only write what turns say: they do not compare, search or cut it. The text is then the template's
own words with the turns' words between them, and where those stand depends on the sequence of roles alone. So one
rendering per sequence, with all that ``render.render`` checks, is a form that every row with this sequence fills in:
no Jinja per row, and no rendering of the prefix of each answer, which grows with the square of the turns.

The proof is a rendering with words that cannot be looked at (``unseen_words``). So a rendering that ends was made
without a branch taken, or a text cut, for what the words say, and is the same for all words of which the answers are
no. What has no form, or does not fit it, is rendered row by row. (Comparing the renderings of a few texts, the other
known way, is no proof: a template that looks for "/no_think" passes.) A template that is none of the named ones is
rendered by ``probe``'s process here too: within limits, whatever chance or the words have it do.

With ``tokenise`` and ``mask.mark_rows`` it halves the time that chats take row by row (tools/results/chats.json); alone
it saves a quarter of it for one question and answer, and more the more turns there are.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, chain

from jinja2 import TemplateError

from qlora_lite.errors import DataError

from .probe import FAULTS, TakesTooMuchError, render_apart
from .render import GENERATION_BLOCK, Rendering, check_no_control_tokens, render, render_turns
from .row_formats import Conversation, Turn, as_message
from .template import NAMED_TEMPLATES, Template
from .unseen_words import ASKS, WRITTEN, LookedAtError, render_blind, unseen

_STRIPPED: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}
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
    asked += [(turn, _STRIPPED[left, right], ASKS[name], of) for turn, left, right, name, of in questions]
    return template.begin + text
