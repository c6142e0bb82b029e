"""Write a conversation as the text the model sees, and say which characters of it are to be learned.

What is learned is found in the text and not by looking for marker tokens: the start of an answer is where the
rendering of all turns before it, with the generation prompt, ends (what the model will have seen when it answers),
and its end is the first special token after it. The end token belongs to the answer. It must be learned, or the
model never stops; trainers that mask it because it equals the padding token are why no padding exists here.

A template with {% generation %} blocks says itself what is learned; that is used where it is there, but for what the
prompt ends with (some blocks begin before the header of the answer, which the model is given). A template that
writes earlier turns differently once later ones follow (it drops old reasoning, say) has no such prefixes: that is
an error, and never an empty mask.

Some templates write today's date. In rows it is always ROW_DAY, so that the same rows give the same tokens on every
day: with the day of the run, the other known way, evaluation rows are not found among training rows of yesterday, a
run cannot go on tomorrow, and cached tokens are of a day that has gone. Prompts for answers have the real date.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_lite.data.picture_turns import MARK
from qlora_lite.errors import DataError

from .conversation import ROW_DAY, Conversation, Turn, as_message
from .probe import FAULTS, TakesTooMuchError, render_apart, render_rows_apart
from .template import CHATML_TOOLS, NAMED_TEMPLATES, Template
from .tools import written_names

CONTROL_TOKEN = "control token in text"
TEMPLATE = "template does not fit"
END_OF_ANSWER = "answer without an end token"
_CURE_OF_TOOLS = f"set data.template to {CHATML_TOOLS}, or to a .jinja file that writes tools, calls and results"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPTIONS = {"text": {}, "prompt": {"add_generation_prompt": True}, "blocks": {"return_assistant_tokens_mask": True}}
_LETTERS_PER_MESSAGE = 2_000_000  # that are to be written, about; more rows at once save little
_CODES = ("-d", "-m", "-H", "-I", *"aAbBcdDefFGHIjmMpSTuUVwWxXyY")  # of strftime
_CLOCK = "".join(
    [  # transformers takes no function for a template in place of its own, so this one is written in Jinja
        "{% macro strftime_now(format) %}{{ format",
        *(f" | replace('%{code}', '{ROW_DAY.strftime('%' + code)}')" for code in _CODES),
        " }}{% endmacro %}\n",  # the line end goes with the tag, and leaves the template at the start of a line
    ]
)


@dataclass(frozen=True, slots=True)
class Rendering:
    """Hold a conversation as text.

    Args:
        text: the whole text, begin-of-text included.
        answers: turn index of every answer asked for -> (first character, one past the last), end token
            included.
    """

    text: str
    answers: dict[int, tuple[int, int]]


# how many turns, and which of _OPTIONS -> text and blocks, None where a rendering failed
Ahead = Mapping[tuple[int, str], tuple[str, list] | None]


@dataclass(frozen=True, slots=True)
class _Written:
    """Give what the template writes of a row's first turns, made ahead or now."""

    template: Template
    conversation: Conversation
    ahead: Ahead

    def text(self, count: int, prompt: bool) -> str:
        if made := self.ahead.get((count, "prompt" if prompt else "text")):
            return self.template.begin + made[0]
        return render_turns(self.template, self.conversation.turns[:count], prompt, self.conversation.tools)

    def blocks(self) -> list:
        turns, tools = self.conversation.turns, self.conversation.tools
        if made := self.ahead.get((len(turns), "blocks")):
            return made[1]
        return _raw(self.template, _in_rows(self.template.source), turns, tools, **_OPTIONS["blocks"])[1]


def render_prompt(template: Template, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> str:
    """Write turns and the generation prompt: the text a model is given to answer.

    Args:
        template: how to write.
        turns: the conversation so far, a user turn last.
        tools: definitions of the tools that may be called.

    Raises:
        DataError: the template fails on these turns, or one of them holds a control token as text, or what is no text.
    """
    if any("\ud800" <= letter <= "\udfff" for turn in turns for letter in turn.content):  # which no tokenizer takes
        raise DataError("a turn holds half of a surrogate pair, or a byte that is not UTF-8; remove it")
    check_no_control_tokens(template, turns, tools)
    return _rendered(template, template.source, turns, True, tools)


def last_turn(template: Template, prompt: str) -> str:
    """Return what a rendered prompt asks: its last user turn, or all of it where that cannot be told.

    Args:
        template: the one that it was rendered with.
        prompt: as ``render_prompt`` or a row writes it, up to the answer.
    """
    mark = "qzx0xzq"
    try:
        before, _, after = render_turns(template, [Turn("user", mark)], True).partition(mark)
    except DataError:
        return prompt
    tokens = list(template.special.finditer(before))
    header = before[tokens[-1].start() :] if tokens else before
    asked = prompt.removesuffix(after)
    asked = asked.rpartition(header)[2] if header else asked
    return template.special.split(asked)[-1].strip()


def render(
    template: Template, conversation: Conversation, answers: Iterable[int], ahead: Ahead | None = None
) -> Rendering:
    """Write a conversation and find the characters of its answers.

    Args:
        template: how to write.
        conversation: at least one user and one assistant turn.
        answers: the indices of the assistant turns to find.
        ahead: what ``render_ahead`` gave for this.

    Returns:
        The text and, for each answer, its characters.

    Raises:
        DataError: the template fails, drops a turn, has no prefixes, or never writes an end token.
    """
    turns = conversation.turns
    check_no_control_tokens(template, turns, conversation.tools)
    written = _Written(template, conversation, ahead or {})
    text = written.text(len(turns), False)
    if GENERATION_BLOCK.search(template.source):
        spans = _block_spans(written, text)
        found = {index: _behind_prompt(written, index, text, spans[index]) for index in answers}
    else:
        found = {index: _prefix_span(written, index, text) for index in answers}
    _check_nothing_dropped(turns, text, found)
    if missing := [name for name in written_names(conversation.tools) if name not in text]:
        raise DataError(
            f"the chat template ({template.name}) does not write the tool {missing[0]!r}; "
            f"{_CURE_OF_TOOLS}, or remove 'tools' from the rows",
            TEMPLATE,
        )
    return Rendering(text, found)


def render_ahead(template: Template, rows: Iterable[tuple[Conversation, Sequence[int]]]) -> Iterator[Ahead]:
    """Yield for each row what ``render`` will ask for, made for many rows at once; a fault is left to ``render``.

    Args:
        template: how to write.
        rows: conversations, each with the indices of the answers to find.
    """
    message, letters = [], 0
    for conversation, answers in rows:
        wanted = _wanted(template, conversation, answers)
        message.append((conversation, wanted))
        letters += len(wanted) * sum(len(turn.content) for turn in conversation.turns)
        if letters > _LETTERS_PER_MESSAGE:
            yield from _rendered_at_once(template, message)
            message, letters = [], 0
    yield from _rendered_at_once(template, message)


def _wanted(template: Template, conversation: Conversation, answers: Sequence[int]) -> list[tuple[int, str]]:
    """Return the keys of ``Ahead`` that ``render`` looks up."""
    whole = len(conversation.turns)
    prompts = [(index, "prompt") for index in answers]
    if GENERATION_BLOCK.search(template.source):
        return [(whole, "text"), (whole, "blocks"), *prompts]
    return [(whole, "text"), *prompts, *((index + 1, "text") for index in answers if index + 1 < whole)]


def _rendered_at_once(
    template: Template, rows: Sequence[tuple[Conversation, Sequence[tuple[int, str]]]]
) -> Iterator[Ahead]:
    if template.source in NAMED_TEMPLATES.values():  # rendered in this process, when it is asked for
        yield from ({} for _ in rows)
        return
    asked = [
        (
            [message_of(template, turn) for turn in conversation.turns],
            {"tools": list(conversation.tools) or None},
            [(count, _OPTIONS[kind]) for count, kind in wanted],
        )
        for conversation, wanted in rows
    ]
    made = iter(render_rows_apart(_in_rows(template.source), template.tokenizer.special_tokens_map, asked))
    for _, wanted in rows:
        yield {key: next(made) for key in wanted}


def message_of(template: Template, turn: Turn) -> dict[str, object]:
    """Return a turn as the object that a template takes, pictures as it takes them."""
    message = as_message(turn)
    if not template.takes_parts:
        return message | {"content": turn.content.replace(MARK, template.picture)} if template.picture else message
    parts = re.split(f"({MARK})", turn.content)
    said = [{"type": "image"} if part == MARK else {"type": "text", "text": part} for part in parts if part]
    return message | {"content": said or [{"type": "text", "text": ""}]}


def for_pictures(template: Template, token: str) -> Template:
    """Return a template for chats with pictures.

    Args:
        token: what a template writes for a picture.

    Raises:
        DataError: it writes pictures neither in lists of parts nor in text.
    """
    turns = Turn("user", f"{MARK}qzx0xzq"), Turn("assistant", "qzx1xzq")
    written = re.compile(rf"{re.escape(token)}\S{{0,32}}\s*qzx0xzq")  # with a token for the picture's end, in some
    for takes_parts in (True, False):
        changed = replace(template, picture=token, takes_parts=takes_parts)
        try:
            text = render_turns(changed, turns, False)
        except DataError:
            continue
        if written.search(text) and "'type'" not in text and text.count(token) == 1:
            return changed
    fault = f"the chat template ({template.name}) writes no {token} for a picture; set data.template to another"
    raise DataError(fault, TEMPLATE)


def check_shape(template: Template, conversation: Conversation) -> None:
    """Check that the template writes every turn of a conversation like this one, each where it belongs.

    ``render`` looks for the row's own words, and a turn such as "user" is found in the text of the template
    itself; here every turn gets a word that stands nowhere else.

    Args:
        template: how to write.
        conversation: the roles and calls that matter; the words are replaced.

    Raises:
        DataError: the template fails on these roles, or drops one of the turns.
    """
    turns = [
        replace(turn, content=f"qzx{index}xzq") if turn.content else turn
        for index, turn in enumerate(conversation.turns)
    ]
    _check_nothing_dropped(turns, render_turns(template, turns, False, conversation.tools), {})


def render_turns(
    template: Template, turns: Sequence[Turn], add_generation_prompt: bool, tools: Sequence[dict] = ()
) -> str:
    """Write turns of a row as transformers does, with nothing checked.

    Args:
        template: how to write.
        turns: at least one.
        add_generation_prompt: whether to write what stands before an answer that is asked for.
        tools: definitions of the row's tools.

    Raises:
        DataError: the template fails on them.
    """
    return _rendered(template, _in_rows(template.source), turns, add_generation_prompt, tools)


def end_of_answers(template: Template) -> str | None:
    """Return the special token with which a template ends an answer; None where it writes none.

    Raises:
        DataError: the template fails on a question and its answer.
    """
    found = template.ending.search(render_turns(template, [Turn("user", "a"), Turn("assistant", "b")], False))
    return found and found[1]


def _in_rows(source: str) -> str:
    return _CLOCK + source if "strftime_now" in source else source


def _rendered(
    template: Template, source: str, turns: Sequence[Turn], add_generation_prompt: bool, tools: Sequence[dict]
) -> str:
    from jinja2 import TemplateError

    try:
        text, _ = _raw(template, source, turns, tools, add_generation_prompt=add_generation_prompt)
    except (TemplateError, *FAULTS) as error:
        reason = str(error) or type(error).__name__
        has_tools = tools or any(turn.calls or turn.role == "tool" for turn in turns)
        cure = f"; {_CURE_OF_TOOLS}" if has_tools and template.name != CHATML_TOOLS else ""
        raise DataError(f"the chat template ({template.name}) refuses this row: {reason}{cure}", TEMPLATE) from error
    return template.begin + text


def _raw(
    template: Template, source: str, turns: Sequence[Turn], tools: Sequence[dict], **options: bool
) -> tuple[str, list]:
    """Return the text of turns and where its blocks of answers are, without begin-of-text.

    Raises:
        TakesTooMuchError: the template takes too much time or memory.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, special = [message_of(template, turn) for turn in turns], template.tokenizer.special_tokens_map
    options |= {"tools": list(tools) or None}
    if template.source in NAMED_TEMPLATES.values():
        (text,), blocks = render_jinja_template([messages], chat_template=source, **options, **special)
        return text, blocks[0] if blocks else []
    try:
        return render_apart(source, messages, special, **options)
    except TakesTooMuchError as error:
        letters = sum(len(turn.content) for turn in turns)
        raise TakesTooMuchError(
            f"the chat template ({template.name}) {error} for a conversation of {len(turns)} turns "
            f"and {letters:,} letters; set data.template to another one"
        ) from None


def check_no_control_tokens(template: Template, turns: Sequence[Turn], tools: Sequence[dict] = ()) -> None:
    """Check that no turn and no tool holds text that the tokenizer reads as a special token.

    Raises:
        DataError: one does.
    """
    texts = [turn.content if not turn.calls else "\n".join((turn.content, *map(_json, turn.calls))) for turn in turns]
    texts += map(_json, tools)
    for number, text in enumerate(texts, start=1):
        if control := template.special.search(text):
            place = f"turn {number}" if number <= len(turns) else "the definition of a tool"
            raise DataError(
                f"{place} holds the text {control.group()!r}, which this tokenizer reads as a control "
                "token; write it differently (the template itself adds such tokens)",
                CONTROL_TOKEN,
            )


def _json(part: dict) -> str:
    return json.dumps(part, ensure_ascii=False)


def _prefix_span(written: _Written, index: int, text: str) -> tuple[int, int]:
    """Find an answer as what follows the rendering of all before it, with the generation prompt."""
    template = written.template
    prompt = written.text(index, True)
    is_last = index == len(written.conversation.turns) - 1
    upto = text if is_last else written.text(index + 1, False)
    end = _end_of_answer(template, upto, len(prompt)) if upto.startswith(prompt) else 0
    if end == 0 or not text.startswith(upto[:end]):
        raise DataError(
            f"the chat template ({template.name}) writes what stands before turn {index + 1} otherwise when "
            "it prompts for that turn, or when later turns follow, so what the model sees is unknown; "
            "set data.train_on to last, choose another data.template, or mark the answers in the template "
            "with {% generation %}",
            TEMPLATE,
        )
    return len(prompt), end


def _end_of_answer(template: Template, text: str, start: int) -> int:
    """Return the place after the first of the special tokens (and white space) that end ``text``."""
    ending = template.ending.search(text, start)
    if ending is None:
        raise DataError(
            f"the chat template ends an answer with {text[start:][-20:]!r}, which holds no special token of "
            "this tokenizer, so the model would never learn to stop; choose another data.template (plain "
            "always ends with the tokenizer's own end token)",
            END_OF_ANSWER,
        )
    return ending.end(1)


def _block_spans(written: _Written, text: str) -> dict[int, tuple[int, int]]:
    """Find the {% generation %} blocks, and let each include the end token that follows it."""
    template, blocks = written.template, written.blocks()
    answers = [index for index, turn in enumerate(written.conversation.turns) if turn.role == "assistant"]
    if len(blocks) != len(answers):
        raise DataError(
            f"the chat template marks {len(blocks)} answers with {{% generation %}}, the row has "
            f"{len(answers)}; choose another data.template",
            TEMPLATE,
        )
    spans = {}
    for index, (start, end) in zip(answers, blocks, strict=True):
        start, end = start + len(template.begin), end + len(template.begin)
        if not template.ending.search(text[:end], start):
            rest = text[end:]
            following = template.special.match(rest, len(rest) - len(rest.lstrip()))
            end += following.end() if following else 0
        spans[index] = start, _end_of_answer(template, text[:end], start)
    return spans


def _behind_prompt(written: _Written, index: int, text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Return the characters of a block without those at its beginning with which the prompt ends."""
    start, end = span
    prompt = written.text(index, True)
    return (len(prompt), end) if text.startswith(prompt) and start < len(prompt) < end else span


def _check_nothing_dropped(turns: Sequence[Turn], text: str, answers: dict[int, tuple[int, int]]) -> None:
    """Check that every turn is written, each behind the one before it.

    Of an answer, the end must be; what it begins with may be written by the prompt, as a "<think>" is by some.
    """
    position = 0
    for index, turn in enumerate(turns):
        *between, content = map(str.strip, turn.content.split(MARK))  # pictures
        position = max([position, *(text.find(piece, position) for piece in between)])
        if index in answers:
            position = max(position, answers[index][0] - max(len(content) - 1, 0))
        position = text.find(content, position)
        end = position + len(content)
        places = [(text.find(name, max(position, 0)), len(name)) for name in written_names(turn.calls)]
        end = max([end, *(place + length for place, length in places)])
        if min([position, *(place for place, _ in places)]) < 0 or (index in answers and end > answers[index][1]):
            cure = _CURE_OF_TOOLS if turn.calls or turn.role == "tool" else "choose another data.template"
            fault = f"the chat template drops or changes turn {index + 1} ({turn.role}); {cure}, or remove that turn"
            raise DataError(fault, TEMPLATE)
        position = end
