"""Read JSON and JSONL strictly, naming the line of every row that is not a whole object.

Python's json keeps the last of two equal keys and accepts NaN; both are faults here, and so are escapes that
are no text (half of a surrogate pair, NUL). Faults that do not stop the parser are noted and reading goes on.

JSON whose rows are in a list inside an object, or stored by columns, is not read: which of several lists is meant, or
whether a list is rows or a part of one, would be a guess. The error says what to do about it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from .data_files import ASK_OLD_MAC, all_lines, numbered_lines, open_bytes
from .problems import Problems, write_place

_HEAD_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_ESCAPED_ODDITY = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
HALF_A_PAIR = "half of a surrogate pair (\\ud800 to \\udfff) is no character; remove it"
NUL = "the row holds a NUL character (\\u0000); remove it"
_NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_CORRECT = "correct or remove this row"
_TOO_DEEP = f"nested too deeply, or a number too long, to be a row; {_CORRECT}"
_SEVERAL_LINES = "one JSON object over several lines; put each row on one line, or the rows into one list"


class _RowDecoder:
    """Decode JSON strictly: duplicate keys, NaN and characters that are no text are faults of the row."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self._faults.append(f"{name} is not JSON; write null"),
        )

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._faults.append(f"the key {twice!r} stands twice in one object; keep one")
        return result

    def decode(self, text: str, start: int) -> tuple[object, int, list[str]]:
        """Return (value, index after it, faults); ValueError and RecursionError end the reading."""
        self._faults = []
        value, end = self._decoder.raw_decode(text, start)
        if _ESCAPED_ODDITY.search(text, start, end):
            dumped = json.dumps(value, ensure_ascii=False)
            if re.search("[\ud800-\udfff]", dumped):
                self._faults.append(HALF_A_PAIR)
            if _NUL_IN_JSON.search(dumped):
                self._faults.append(NUL)
        return value, end, self._faults


def decode_text(text: str) -> object:
    """Decode a text that is one JSON value, as strictly as a row.

    Raises:
        ValueError: it is not, or the value has faults; RecursionError where it is nested too deeply.
    """
    stripped = text.strip(" \t\r\n")
    value, end, faults = _RowDecoder().decode(stripped, 0)
    if end < len(stripped):
        faults = [*faults, f"something follows the value: {stripped[end : end + 20]!r}"]
    if faults:
        raise ValueError("; ".join(dict.fromkeys(faults)))
    return value


def read_jsonl(path: Path, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Read one object per line; blank lines are skipped, lines that are no whole object go to ``problems``."""
    decoder = _RowDecoder()
    for number, line in numbered_lines(path, problems):
        text = line.strip(" \t\r")
        if not text:
            continue
        where = f"{path}:{number}"
        try:
            value, end, faults = decoder.decode(text, 0)
        except json.JSONDecodeError as error:
            problems.add(where, _json_message(error, text, number))
            continue
        except (RecursionError, ValueError):
            problems.add(where, _TOO_DEEP)
            continue
        if end < len(text):
            cure = ASK_OLD_MAC if text[end] == "\r" else "one object per line"
            faults = [*faults, f"something follows the object: {text[end : end + 20]!r}; {cure}"]
        yield from _checked(where, value, faults, problems)


def _json_message(error: json.JSONDecodeError, text: str, number: int) -> str:
    if text == "{" and number == 1:
        return "one JSON object over several lines; put each row on one line, or the rows into one list in a .json file"
    if text == "[" and number == 1:
        return "this is one JSON document over several lines; name the file .json, or put one row per line"
    cut = " (is the line cut short?)" if error.pos >= len(text) or "Unterminated" in error.msg else ""
    return f"not JSON: {error.msg} at character {error.pos + 1}{cut}; {_CORRECT}"


def _checked(where: str, value: object, faults: list[str], problems: Problems) -> Iterator[tuple[str, dict]]:
    if isinstance(value, list):
        faults = [
            *faults,
            "a list instead of an object; each row must be an object (one list of rows: name the file .json)",
        ]
    elif not isinstance(value, dict):
        faults = [*faults, f"{type(value).__name__} instead of an object; each row must be an object"]
    if isinstance(value, dict) and not faults:
        yield where, value
    else:
        problems.add(where, "; ".join(dict.fromkeys(faults)))


def read_json(path: Path, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Read a .json file: one list of objects, or (as many files of that name are) one object per line.

    One that is a single object is a problem, which says where its rows may be.
    """
    with open_bytes(path) as file:
        head = file.read(_HEAD_BYTES).removeprefix(_BOM).lstrip()
    is_list = not head or head.startswith(b"[")
    if not is_list and _begins_with_a_row(path):
        return read_jsonl(path, problems)
    with open_bytes(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not is_list:
            return read_jsonl(path, problems)
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"{path}:{line}", "not UTF-8; convert the file to UTF-8", "not UTF-8", fatal=True)
        return iter(())
    if text.lstrip().startswith("["):
        return _read_json_array(path, text, problems)
    if fault := _fault_of_one_object(text, path):
        problems.add(f"{path}:1", fault, fatal=True)
        return iter(())
    return read_jsonl(path, problems)


def _begins_with_a_row(path: Path) -> bool:
    """Return whether one of the first two lines, empty ones apart, is whole JSON, as where each row has its own."""
    texts = (text for _, text, _ in all_lines(path) if text is None or text.strip())
    for text in islice(texts, 2):
        with suppress(ValueError, RecursionError):
            json.loads(text or "")
            return True
    return False


def _skip_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position


def _read_json_array(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Walk a JSON array element by element, so that each keeps its line, and its number where a line holds several."""
    decoder = _RowDecoder()
    line, counted, row, shares_line = 1, 0, 0, False
    position = _skip_space(text, text.index("[") + 1)
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted, row = position, row + 1
        try:
            value, end, faults = decoder.decode(text, position)
        except json.JSONDecodeError as error:
            fault = f"not JSON: {error.msg}; nothing after this place was read"
            problems.add(write_place(str(path), error.lineno, row * shares_line), fault, fatal=True)
            return
        except (RecursionError, ValueError):
            where = write_place(str(path), line, row * shares_line)
            problems.add(where, f"{_TOO_DEEP}; nothing after it was read", fatal=True)
            return
        position = _skip_space(text, end)
        is_parted = text.startswith(",", position) and not text.startswith("]", _skip_space(text, position + 1))
        if is_parted:
            position = _skip_space(text, position + 1)
        is_followed = is_parted and "\n" not in text[counted:position]
        yield from _checked(write_place(str(path), line, row * (shares_line or is_followed)), value, faults, problems)
        shares_line = is_followed
        if not is_parted and not text.startswith("]", position):
            line += text.count("\n", counted, position)
            problems.add(f"{path}:{line}", "the list is cut short, or a comma is missing or too many here", fatal=True)
            return
    if text[position + 1 :].strip():
        problems.add(f"{path}:{line}", "something follows the end of the list; remove it")


def _fault_of_one_object(text: str, path: Path) -> str | None:
    """Return what is wrong with a .json file that is one object, and the cure; None if it is not one.

    Args:
        text: all of the file.
        path: the file.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    asked = ask_for_columns(value) or ask_for_list(value, path)
    return f"the file is one JSON object; {asked}" if asked else _SEVERAL_LINES


def ask_for_columns(row: Mapping[str, object]) -> str | None:
    """Ask whether an object is a table column by column, as pandas writes one unless told otherwise."""
    columns = list(row.values())
    if not (_are_numbered(columns) or _are_as_long(columns)):
        return None
    cure = "write it row by row, in pandas with to_json('rows.jsonl', orient='records', lines=True)"
    return f"is it a table written column by column? then {cure}"


def _are_numbered(columns: list[object]) -> bool:
    """Return whether all columns are objects with the same keys, which are numbers."""
    objects = [column for column in columns if isinstance(column, dict) and column]
    if not columns or len(objects) < len(columns):
        return False
    return all(map(str.isdecimal, objects[0])) and all(column.keys() == objects[0].keys() for column in objects)


def _are_as_long(columns: list[object]) -> bool:
    """Return whether all of several columns are lists of texts, numbers and the like, and have one length."""
    lists = [column for column in columns if isinstance(column, list) and column]
    if len(columns) < 2 or len(lists) < len(columns):
        return False
    is_plain = not any(isinstance(item, list | dict) for column in lists for item in column)
    return is_plain and len({len(column) for column in lists}) == 1


def ask_for_list(row: Mapping[str, object], path: Path) -> str | None:
    """Ask whether the rows, or the turns of this one, are in a list of objects, and say what to do.

    Args:
        row: column to value.
        path: the file that it comes from.
    """
    lists = {name: value for name, value in row.items() if isinstance(value, list) and _holds_objects(value)}
    turns = [name for name, items in lists.items() if any("role" in item or "from" in item for item in items)]
    if turns or not lists:
        return f"are the turns in the list {turns[0]!r}? then rename it messages" if len(turns) == 1 else None
    first, *others = lists
    if others:
        counted = ", ".join(f"{name!r} ({len(items):,})" for name, items in lists.items())
        asked = f"are the rows in one of the lists {counted}? then make that list the file"
    else:
        asked = f"are the rows in the list {first!r}? then make that list the file"
    if path.suffix.lower() not in (".json", ".jsonl") or not first.isidentifier():
        return asked
    made = f"json.dump(json.load(open({str(path)!r}, 'rb'))[{first!r}], open('rows.json', 'w'))"
    return f'{asked}, as with python -c "import json; {made}"'


def _holds_objects(value: list) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value)
