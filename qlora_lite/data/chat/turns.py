"""Read the turns of a row, and refuse what would be lost of them or stands in no order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlora_lite.data.readers.fields import kind_of, text_of
from qlora_lite.errors import DataError

from .conversation import ROLES, Turn
from .tools import tool_calls

_NOT_SUPPORTED = {
    "functions": "write it as 'tools'",
    "function_call": "write it as 'tool_calls'",
    "reasoning_content": "remove it",
    "thinking": "remove it",
    "history": 'write all turns of the row as one list, {"messages": [...]}',
}
_MEDIA = "image", "images", "video", "videos", "audio", "audios"
_REFUSED = *_MEDIA, *_NOT_SUPPORTED
_TEXT_ONLY = (
    "a model of text reads no pictures, sounds or videos; remove such rows, or train a vision-language model on "
    "pictures (task.kind image-text-to-text)"
)
MEDIA = "picture, sound or video"
_PLACEHOLDER = (
    r"(?:<(?:image|video|audio)>|<\|(?:vision_start|(?:image|video|audio)(?:_pad|_[0-9]+)?)\|>|<image_soft_token>|"
    r"<start_of_image>|<image_placeholder>|<ImageHere>|<IMG_CONTEXT>|\[IMG\])"
)
_PLACEHOLDERS = re.compile(_PLACEHOLDER)
_PLACED = re.compile(  # at the turn's beginning or end, alone on a line, or right before a word
    rf"\A\s*{_PLACEHOLDER}|{_PLACEHOLDER}(?:\s*\Z|(?=\w))|^[ \t]*{_PLACEHOLDER}+[ \t]*$", re.MULTILINE
)
WITH_TURNS = "messages", "conversations", "prompt", "completion"
_AFTER = {"user": ("assistant",), "assistant": ("user",), "tool": ("tool", "assistant")}


def kinds_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """Return what sets a row apart, good or not, in words that follow "rows"."""
    turns = [turn for name in WITH_TURNS if isinstance(row.get(name), list) for turn in row[name]]
    roles = [role_of(turn) for turn in turns]
    calls = any(
        isinstance(turn, dict) and (turn.get("tool_calls") or turn.get("from") == "function_call") for turn in turns
    )
    return tuple(
        kind
        for kind, is_so in (
            ("with tool calls or results", calls or "tool" in roles),
            ("with definitions of tools", row.get("tools") not in (None, "", "[]", [])),
            ("with a system turn", row.get("system") not in (None, "") or "system" in roles),
            ("with several user turns", roles.count("user") > 1),
        )
        if is_so
    )


def role_of(turn: object) -> str | None:
    """Return the role of a turn as a row has it; None where it names none that is known."""
    named = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(named) if isinstance(named, str) else None


def has_lists(row: Mapping[str, object]) -> bool:
    """Return whether prompt and completion are lists of turns."""
    return all(isinstance(row.get(key), list) for key in ("prompt", "completion"))


def refuse_lost_keys(holder: Mapping[str, object]) -> None:
    """Check that a row or turn holds nothing that would be lost."""
    if holder.keys().isdisjoint(_REFUSED):
        return
    for key in _REFUSED:
        if holder.get(key) and key in _MEDIA:
            raise DataError(f"{key!r} is not supported: {_TEXT_ONLY}", MEDIA)
        if holder.get(key):
            raise DataError(f"{key!r} is not supported in rows of this format; {_NOT_SUPPORTED[key]}")


def check_text_only(turns: Sequence[Turn]) -> None:
    """Check that no user turn holds a placeholder of a picture, sound or video."""
    for number, turn in enumerate(turns, start=1):
        if turn.role != "user" or not _PLACEHOLDERS.search(turn.content):
            continue
        for placed in _PLACED.finditer(turn.content):
            written = _PLACEHOLDERS.search(placed[0])[0]
            if f"{written[0]}/{written[1:]}" not in turn.content:
                cure = "or write it in backticks where it is meant as text"
                raise DataError(f"turn {number} holds the placeholder {written!r}: {_TEXT_ONLY}, {cure}", MEDIA)


def read_turns(row: Mapping[str, object], format_name: str) -> tuple[Turn, ...]:
    """Return the turns of a row that has lists of them.

    Raises:
        DataError: there is no list, or a turn is malformed.
    """
    is_pair = format_name == "prompt-completion" and has_lists(row)
    prompt = row["prompt"] if is_pair else []
    messages = [*prompt, *row["completion"]] if is_pair else row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise DataError(f"no list of turns, as format {format_name} needs; are two formats mixed in this source?")
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    asked = turns[: len(prompt)]
    turns[: len(prompt)] = [replace(turn, is_target=False) if turn.role == "assistant" else turn for turn in asked]
    if row.get("system"):
        turns.insert(0, Turn("system", text_of(row, "system")))
    return tuple(turns)


def _turn(message: object, number: int) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f'turn {number} is {kind_of(message)}, not an object with "role" and "content"')
    refuse_lost_keys(message)
    if message.keys().isdisjoint(("role", "from")):
        keys = ", ".join(map(repr, message)) or "none"
        raise DataError(
            f"turn {number} does not say whose it is (its keys: {keys}); write it as "
            '{"role": "user", "content": ...}',
            "unknown role",
        )
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    if content_key not in message:
        content_key = next((key for key in ("content", "value") if key in message), content_key)
    named = message.get(role_key)
    if not isinstance(named, str) or named not in ROLES:
        known = f"the roles are {', '.join(ROLES)}"
        raise DataError(f"turn {number} has the unknown role {named!r}; {known}", "unknown role")
    role = ROLES[named]
    content = message.get(content_key)
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    try:
        if named == "function_call":
            calls, content = tool_calls(text_of({content_key: content}, content_key)), ""
        else:
            calls = tool_calls(message.get("tool_calls"))
        if calls and role != "assistant":
            raise DataError("only the assistant can call tools; remove 'tool_calls'")
        if role == "system" and isinstance(content, str) and not content.strip():
            # not left out here: templates with a system text of their own write it where there is no such turn
            raise DataError(f"{content_key!r} is empty; fill it in, or remove the turn (not the row)")
        text = "" if calls and content in (None, "") else text_of({content_key: content}, content_key)
    except DataError as error:
        raise DataError(f"turn {number} ({named}): {error}") from None
    is_target = _is_target(message, number)
    if role != "tool":
        return Turn(role, text, is_target, calls, left_out=role == "assistant" and not is_target)
    call_id, name = (value if isinstance(value := message.get(key), str) else None for key in ("tool_call_id", "name"))
    return Turn(role, text, is_target, (), call_id, name)


def _part(part: object, number: int) -> str:
    text = part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        if isinstance(part, dict) and any(name in str(part.get("type")) for name in ("image", "video", "audio")):
            raise DataError(f"turn {number} has a part of type {part['type']!r}: {_TEXT_ONLY}", MEDIA)
        raise DataError(f'turn {number} has a part that is not {{"type": "text", "text": "..."}}; only text can train')
    return text


def _is_target(message: Mapping[str, object], number: int) -> bool:
    """Return whether nothing in a turn says that it is not to be learned."""
    is_target = True
    for key in ("weight", "loss_weight", "train"):
        given = message.get(key)
        if given is None:
            continue
        if key == "train" and not isinstance(given, bool):
            raise DataError(f"turn {number} has train {given!r}; a turn is learned (true) or not (false)")
        if given not in (0, 1):
            raise DataError(f"turn {number} has {key} {given!r}; a turn is learned (1) or not (0)")
        is_target = is_target and bool(given)
    return is_target


def check_order(turns: tuple[Turn, ...]) -> None:
    """Check that turns alternate, and that the last is an answer."""
    expected = ("system", "user")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in expected:
            raise DataError(
                f"turn {number} is {turn.role} where {expected[-1]} must stand; turns alternate, user first, one "
                "system turn at most before them"
            )
        after = _AFTER.get(turn.role, ("user",))
        expected = ("tool",) if turn.calls else after
    if turns[-1].role != "assistant":
        raise DataError("a row with no answer: the last turn must be the assistant's")
