"""Turn rows of the formats found in the wild into conversations, or into plain documents.

The format is recognised from the keys of a source's first row, and every later row must have it too: guessing
row by row would let a mixed file train on half of each row without a word. Nothing is repaired: a missing
answer, an unknown role or a number where text should be is an error of that row.

| format            | a row                                                                                |
|-------------------|--------------------------------------------------------------------------------------|
| messages          | {"messages": [{"role", "content", "weight"?}]}; content: text or a list of text parts |
| sharegpt          | {"conversations": [{"from", "value"}], "system"?}                                    |
| alpaca            | {"instruction", "input"?, "output", "system"?}                                       |
| prompt-completion | {"prompt", "completion"}                                                             |
| text              | {"text"}                                                                             |
| table             | any columns; the prompt and completion templates of the source name them             |
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_lite.data.lines import Problems
from qlora_lite.data.read import Source, read_rows
from qlora_lite.errors import DataError

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text", "table")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
_NOT_SUPPORTED = (
    "tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking",
    "history", "images", "audios", "videos",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """Hold one message.

    Args:
        role: "system", "user" or "assistant".
        content: its text, never empty.
        learned: False where the row gives this turn the weight 0.
    """

    role: str
    content: str
    learned: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Hold a row as turns: at most one system turn, then user and assistant alternating, an answer last."""

    turns: tuple[Turn, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Document:
    """Hold a row of plain text, all of it to be learned."""

    text: str
    where: str


def read_conversations(source: Source, problems: Problems) -> Iterator[Conversation | Document]:
    """Read a source and normalise its rows; rows that cannot be used go to `problems`.

    Args:
        source: where to read and how.
        problems: collects malformed rows, each with its place.

    Returns:
        An iterator over the good rows, in order.

    Raises:
        DataError: the format is unknown or not recognised, or a file cannot be read.
    """
    format_name = check_format(source)
    for where, row in read_rows(source, problems):
        if format_name is None:
            format_name = recognise(row, where)
        try:
            yield normalise(row, where, format_name, source)
        except DataError as error:
            problems.add(where, error)


def check_format(source: Source) -> str | None:
    """Return the format that the source itself decides, or None if its rows must be looked at.

    Raises:
        DataError: the format has no such name, or the prompt and completion templates do not fit it.
    """
    templates = [text for text in (source.prompt, source.completion) if text is not None]
    if source.format is not None and source.format not in FORMATS:
        raise DataError(f"{source.path}: {source.format!r} is not a format; choose one of {', '.join(FORMATS)}")
    if len(templates) == 1 or (source.format == "table" and not templates):
        raise DataError(
            f"{source.path}: a table needs both prompt and completion, for example prompt: '{{question}}' "
            "and completion: '{answer}'"
        )
    if templates and source.format not in (None, "table"):
        raise DataError(f"{source.path}: prompt and completion belong to format table, not {source.format}")
    return "table" if templates else source.format


def recognise(row: Mapping[str, object], where: str) -> str:
    """Name the format of a row from its keys.

    Raises:
        DataError: no format has these keys.
    """
    if isinstance(row.get("messages"), list):
        return "messages"
    turns = row.get("conversations")
    if isinstance(turns, list):
        return "sharegpt" if any(isinstance(turn, dict) and "from" in turn for turn in turns) else "messages"
    for name, keys in (("alpaca", {"instruction", "output"}), ("prompt-completion", {"prompt", "completion"}),
                       ("text", {"text"})):  # fmt: skip
        if keys <= row.keys():
            return name
    raise DataError(
        f"{where}: no format has the columns {', '.join(map(repr, row))}; say which ones to use with "
        "prompt: '{column}' and completion: '{column}', or name the format"
    )


def normalise(row: Mapping[str, object], where: str, format_name: str, source: Source) -> Conversation | Document:
    """Turn one row into a conversation or a document.

    Args:
        row: column to value.
        where: the row's place.
        format_name: one of FORMATS.
        source: gives the templates of a table.

    Raises:
        DataError: the row does not fit; the message names the field and the cure, without the place.
    """
    if format_name != "table":
        _refuse(row)
    if format_name == "text":
        return Document(_text(row, "text"), where)
    if format_name == "table":
        pair = _fill(source.prompt, row), _fill(source.completion, row)
        turns = _pair(*pair, None)
    elif format_name == "alpaca":
        context = row.get("input")
        prompt = _text(row, "instruction") + (f"\n\n{_text(row, 'input')}" if context not in (None, "") else "")
        turns = _pair(prompt, _text(row, "output"), row.get("system"))
    elif format_name == "prompt-completion":
        turns = _pair(_text(row, "prompt"), _text(row, "completion"), None)
    else:
        turns = _turns(row, format_name)
    _check_order(turns)
    return Conversation(turns, where)


def _refuse(holder: Mapping[str, object]) -> None:
    for key in _NOT_SUPPORTED:
        if holder.get(key):
            raise DataError(f"{key!r} is not supported in training rows; remove it")


def _text(holder: Mapping[str, object], key: str) -> str:
    value = holder.get(key)
    if value is None:
        raise DataError(f"{key!r} is missing or null; every row needs it")
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {_kind(value)}, not text; put it in quotes")
    if not value.strip():
        raise DataError(f"{key!r} is empty; fill it in or remove the row")
    return value


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _pair(prompt: str, answer: str, system: object) -> tuple[Turn, ...]:
    turns = Turn("user", prompt), Turn("assistant", answer)
    return turns if system in (None, "") else (Turn("system", _text({"system": system}, "system")), *turns)


def _turns(row: Mapping[str, object], format_name: str) -> tuple[Turn, ...]:
    messages = row.get("messages") if "messages" in row else row.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"no list of turns, as format {format_name} needs; are two formats mixed in this source?")
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    if row.get("system"):
        turns.insert(0, Turn("system", _text(row, "system")))
    return tuple(turns)


def _turn(message: object, number: int) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f'turn {number} is {_kind(message)}, not an object with "role" and "content"')
    _refuse(message)
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    role = message.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        known = f"the roles are {', '.join(_ROLES)}"
        raise DataError(f"turn {number} has the unknown role {role!r}; {known}", "unknown role")
    content = message.get(content_key)
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    try:
        text = _text({content_key: content}, content_key)
    except DataError as error:
        raise DataError(f"turn {number} ({role}): {error}") from None
    return Turn(_ROLES[role], text, _learned(message, number))


def _part(part: object, number: int) -> str:
    text = part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise DataError(f'turn {number} has a part that is not {{"type": "text", "text": "..."}}; only text can train')
    return text


def _learned(message: Mapping[str, object], number: int) -> bool:
    for key in ("weight", "loss_weight"):
        weight = message.get(key)
        if weight is None:
            continue
        if weight not in (0, 1):
            raise DataError(f"turn {number} has {key} {weight!r}; a turn is learned (1) or not (0)")
        return bool(weight)
    return True


def _check_order(turns: tuple[Turn, ...]) -> None:
    talk = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(talk):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            number = index + 1 + len(turns) - len(talk)
            raise DataError(
                f"turn {number} is {turn.role} where {expected} must stand; turns alternate, user first, one "
                "system turn at most before them"
            )
    if len(talk) % 2 or not talk:
        raise DataError("a row with no answer: the last turn must be the assistant's")


def _fill(template: str | None, row: Mapping[str, object]) -> str:
    """Fill the {column} places of a template; only plain names, so that it cannot reach into objects."""
    parts = []
    try:
        pieces = list(string.Formatter().parse(template or ""))
    except ValueError as error:
        raise DataError(f"the template {template!r} is not balanced ({error}); write {{{{ for a brace") from None
    for literal, column, spec, conversion in pieces:
        parts.append(literal)
        if column is None:
            continue
        if column not in row or spec or conversion:
            raise DataError(f"the template {template!r} names {{{column}}}; the columns are {', '.join(row)}")
        value = row[column]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        parts.append(str(value) if is_number else _text(row, column))
    filled = "".join(parts)
    if not filled.strip():
        raise DataError(f"the template {template!r} gives an empty text for this row")
    return filled
