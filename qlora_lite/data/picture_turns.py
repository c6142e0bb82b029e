"""Find the pictures of a chat's row: where they stand in its turns, and what the row says of each.

Rows in the wild have them in two ways, alone or together. A user's turn is a list of parts, one of which is a picture:
{"type": "image", "image" | "path" | "url" | "bytes": ...}, OpenAI's {"type": "image_url", "image_url": {"url": ...}},
or {"type": "image"} alone. Or the row has a column "images" (or "image"), and each placeholder <image> in a user's turn
means the next one of it, as a part that says nothing does. Pictures of a row without placeholders come before its
first user turn.

A picture is a path (from the folder that the table lies in), a file's bytes as data sets of the hub have them, or a
data: URL. Others are refused: nothing is fetched while rows are read, and what lies behind an address changes.

source: OpenAI's chat completions API; transformers, "Multimodal chat templates"; LLaMA-Factory, data/README.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_lite.errors import DataError

from .picture_files import NO_PICTURE

MARK = "\ufffc"  # stands for a picture in a turn: Unicode's own character for an object inside text
PLACEHOLDER = "<image>"
COLUMNS = "images", "image"
PART_TYPES = "image", "image_url", "input_image"
_SAYS = "image", "image_url", "path", "url", "bytes", "base64"
_USERS = "user", "human"
_TEXTS = "messages", "conversations", "prompt", "instruction", "input"


@dataclass(slots=True)
class _Found:
    """What was found so far: for each mark what the row says of it there, None where the column says it."""

    said: list[object] = field(default_factory=list)

    def marked(self, text: object) -> object:
        """Return a text with marks for its placeholders."""
        if not isinstance(text, str):
            return text
        if MARK in text:
            raise DataError("a text holds the character U+FFFC, which stands for a picture here; remove it")
        self.said += [None] * text.count(PLACEHOLDER)
        return text.replace(PLACEHOLDER, MARK)


def take_out(row: Mapping[str, object]) -> tuple[dict[str, object], list[object]]:
    """Return a row whose turns are text, with MARK for each picture, and what the row says of each.

    Raises:
        DataError: as many pictures as placeholders are wanted, or one stands in another turn than a user's.
    """
    row, found = dict(row), _Found()
    listed: list[object] = []
    for column in COLUMNS:
        value = row.pop(column, None)
        if value is not None and not (isinstance(value, str | list) and not value):
            listed += value if isinstance(value, list) else [value]
    for name in _TEXTS:
        if isinstance(row.get(name), list):
            row[name] = [_turn(turn, number, found) for number, turn in enumerate(row[name], start=1)]
        elif name in row:
            row[name] = found.marked(row[name])
    if listed and not found.said:
        _put_first(row, len(listed))
        found.said = [None] * len(listed)
    if (holes := sum(said is None for said in found.said)) != len(listed):
        raise DataError(
            f"{holes} placeholders {PLACEHOLDER} (or parts that name no picture), and {len(listed)} "
            "pictures in the column images; write as many of one as of the other",
            NO_PICTURE,
        )
    column = iter(listed)
    return row, [next(column) if said is None else said for said in found.said]


def _turn(turn: object, number: int, found: _Found) -> object:
    if not isinstance(turn, Mapping):
        return turn
    key = next((key for key in ("content", "value") if key in turn), None)
    content, is_users = turn.get(key), turn.get("role", turn.get("from")) in _USERS
    if isinstance(content, list):
        if any(_is_picture(part) for part in content) and not is_users:
            raise DataError(f"turn {number} has a picture, and only a user's turns can; move it there")
        content = [_part(part, found) for part in content] if is_users else content
    elif is_users:
        content = found.marked(content)
    return turn if key is None else {**turn, key: content}


def _is_picture(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in PART_TYPES


def _part(part: object, found: _Found) -> object:
    """Return a part of a turn as text, if it is a picture."""
    if not _is_picture(part):
        is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        return {**part, "text": found.marked(part["text"])} if is_text else part
    said = next((part[key] for key in _SAYS if part.get(key) is not None), None)
    if isinstance(said, str) and any(part.get(key) == said for key in ("bytes", "base64")):
        said = f"data:,{said}"
    found.said.append(said.get("url", said) if isinstance(said, Mapping) and "url" in said else said)
    return {"type": "text", "text": MARK}


def _put_first(row: dict[str, object], count: int) -> None:
    """Put marks before the first user turn of a row."""
    for name in _TEXTS:
        value = row.get(name)
        if isinstance(value, str):
            row[name] = MARK * count + value
            return
        for number, turn in enumerate(value if isinstance(value, list) else ()):
            if isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in _USERS:
                key = "content" if "content" in turn else "value"
                held = turn.get(key)
                text = MARK * count
                new = [{"type": "text", "text": text}, *held] if isinstance(held, list) else f"{text}{held or ''}"
                row[name] = [*value[:number], {**turn, key: new}, *value[number + 1 :]]
                return
    raise DataError("the row has pictures, and no user's turn that they belong to; remove them", NO_PICTURE)
