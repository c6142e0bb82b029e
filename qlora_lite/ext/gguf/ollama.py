"""A folder that ``ollama create`` takes: the model as GGUF, and a Modelfile that prompts it as training did.

Ollama's templates are Go's, chat templates are Jinja. Instead of a list of well-known pairs, the Jinja template is
asked what it writes around marked turns; for every template that writes a conversation as

    opening [system] user (before-answer answer before-user user)* prompt

(ChatML, Llama 3, Gemma, Mistral, Zephyr, Phi, ... whatever the marks are) the same pieces are put into Go's language.
Then both are rendered for random conversations and must give the same tokens; a template that does more than that
(dates, tools, turns that change when others follow) fails there and is refused with the first difference.

Turns are stripped of white space at both ends: many Jinja templates do it themselves, Go's cannot.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.data.chat.template import Template
from qlora_lite.errors import DataError, ModelError

from .go_template import render_go

CONVERSATIONS = 200
_SYSTEM, _USER, _ANSWER, _NEXT = "qzx0xzq", "qzx1xzq", "qzx2xzq", "qzx3xzq"  # stand nowhere else
_WORDS = (
    "the",
    "price",
    "is",
    "1234.50",
    "naïve",
    "Grüße",
    "東京",
    "🙂",
    "def f(x):",
    "a\nb",
    "x  y",
    "\n\n",
    "<b>",
    "don't",
    "{{ .System }}",
    '"quoted"',
    "\\n",
    "#",
    "    indented",
    "...",
    "A",
    "z",
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a chat template writes around the turns of a conversation.

    Args:
        opening: before the first user turn when there is no system message.
        before_system: before the system message; None if the template takes none.
        after_system: between the system message and the first user turn.
        before_answer: between a user turn and an answer that was given.
        before_user: after an answer, before the next user turn.
        prompt: after the last user turn, for the answer to come.
    """

    opening: str
    before_system: str | None
    after_system: str
    before_answer: str
    before_user: str
    prompt: str

    def without_begin(self, begin: str) -> "Pieces":
        """Return the pieces without a begin-of-text token in front, which llama.cpp adds by itself."""
        system = self.before_system and self.before_system.removeprefix(begin)
        return replace(self, opening=self.opening.removeprefix(begin), before_system=system)


def pieces_of(template: Template) -> Pieces:
    """Ask a chat template what it writes around turns.

    Raises:
        ModelError: it does not write turns one after the other.
    """
    user, answer, following = Turn("user", _USER), Turn("assistant", _ANSWER), Turn("user", _NEXT)
    try:
        opening, prompt = _split(render_prompt(template, [user]), _USER)
        text = render_prompt(template, [user, answer, following])
        _, before_answer, before_user, _ = _split(text, _USER, _ANSWER, _NEXT)
    except (DataError, ValueError) as error:
        raise ModelError(f"the chat template cannot be written for Ollama: {error}") from error
    try:
        with_system = render_prompt(template, [Turn("system", _SYSTEM), user])
        before_system, after_system, _ = _split(with_system, _SYSTEM, _USER)
    except (DataError, ValueError):  # it takes no system message
        before_system, after_system = None, ""
    return Pieces(opening, before_system, after_system, before_answer, before_user, prompt)


def _split(text: str, *marks: str) -> list[str]:
    """Cut a text at marks that must stand in it once each and in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"a turn is written {text.count(mark)} times")
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def go_template(pieces: Pieces) -> str:
    """Write pieces as a Go template for Ollama."""
    opening = _literal(pieces.opening)
    if pieces.before_system is not None:
        system = f"{_literal(pieces.before_system)}{{{{ .System }}}}{_literal(pieces.after_system)}"
        opening = f"{{{{ if .System }}}}{system}{{{{ else }}}}{opening}{{{{ end }}}}"
    answer = f"{_literal(pieces.before_answer)}{{{{ .Content }}}}{_literal(pieces.before_user)}"
    turns = (
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
    )
    return opening + turns + _literal(pieces.prompt)


def _literal(text: str) -> str:
    """Check text that Go's template must leave as it is."""
    if "{{" in text:
        raise ModelError("the chat template writes {{, which a Modelfile cannot hold")
    return _in_quotes(text)


def _in_quotes(text: str) -> str:
    """Check text that stands in a Modelfile's triple quotes."""
    if '"""' in text:
        raise ModelError('three quotes (""") are in the chat template or system message; a Modelfile cannot hold them')
    return text


def check_template(go: str, template: Template, tokenizer, takes_system: bool, adds_begin: bool) -> int:
    """Render random conversations both ways and compare the tokens; return how many were compared.

    Args:
        go: the Go template, without begin-of-text if ``adds_begin``.
        takes_system: try system messages too.
        adds_begin: whether llama.cpp puts begin-of-text before the text.

    Raises:
        ModelError: two renderings differ; the first difference is shown.
    """
    draw, compared = random.Random(0), 0
    for number in range(CONVERSATIONS):
        turns = _random_turns(draw, takes_system and number % 2 == 1)
        try:
            expected = tokenizer(render_prompt(template, turns), add_special_tokens=False).input_ids
        except DataError:  # a word of the list is a control token here
            continue
        system = turns[0].content if turns[0].role == "system" else ""
        messages = [{"Role": turn.role, "Content": turn.content} for turn in turns]
        found = tokenizer(render_go(go, system, messages), add_special_tokens=False).input_ids
        found = [tokenizer.bos_token_id, *found] if adds_begin else found
        if found != expected:
            raise ModelError(_difference(tokenizer, expected, found, turns))
        compared += 1
    if compared < CONVERSATIONS // 2:
        raise ModelError("the chat template refuses most conversations; it cannot be checked for Ollama")
    return compared


def _random_turns(draw: random.Random, with_system: bool) -> list[Turn]:
    roles = (["system"] if with_system else []) + ["user"] + ["assistant", "user"] * draw.randrange(4)
    return [Turn(role, _random_text(draw)) for role in roles]


def _random_text(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(1, 12))).strip() or "x"


def _difference(tokenizer, expected: list[int], found: list[int], turns: Sequence[Turn]) -> str:
    place = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(expected), len(found)) if place is None else place
    first, second = (tokenizer.decode(ids[place : place + 8]) for ids in (expected, found))
    return (
        f"the chat template cannot be written for Ollama: for {len(turns)} turns it writes {first!r} where the "
        f"Modelfile's template writes {second!r}; serve the GGUF file with llama.cpp, which reads the chat template"
    )


def modelfile(go: str, stops: Sequence[str], system: str | None) -> str:
    """Write a Modelfile for ``model.gguf`` beside it."""
    lines = ["FROM ./model.gguf", f'TEMPLATE """{go}"""']
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops]
    if system:
        lines.append(f'SYSTEM """{_in_quotes(system)}"""')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if '"' in text or "\n" in text:
        raise ModelError(f"the end token {text!r} cannot be written into a Modelfile")
    return text
