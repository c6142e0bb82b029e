"""Say what to do about JSON whose rows are not where they are looked for: in a list inside an object, or by columns.

Such files are not read: which of several lists is meant, or whether a list is rows or a part of one, would be a guess.
"""

import json
from collections.abc import Mapping
from pathlib import Path

_SEVERAL_LINES = "one JSON object over several lines; put each row on one line, or the rows into one list"


def fault_of_one_object(text: str, path: Path) -> str | None:
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
    """Tell whether all columns are objects with the same keys, which are numbers."""
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return False
    return all(map(str.isdecimal, columns[0])) and all(column.keys() == columns[0].keys() for column in columns)


def _are_as_long(columns: list[object]) -> bool:
    """Tell whether all of several columns are lists of texts, numbers and the like, and have one length."""
    if len(columns) < 2 or not all(isinstance(column, list) and column for column in columns):
        return False
    is_plain = not any(isinstance(item, list | dict) for column in columns for item in column)
    return is_plain and len({len(column) for column in columns}) == 1


def ask_for_list(row: Mapping[str, object], path: Path) -> str | None:
    """Ask whether the rows, or the turns of this one, are in a list of objects, and say what to do.

    Args:
        row: column to value.
        path: the file that it comes from.
    """
    lists = {name: value for name, value in row.items() if _holds_objects(value)}
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


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
