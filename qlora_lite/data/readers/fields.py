"""Take text out of a row's fields. Nothing is converted or repaired: a number where text should be is an error."""

import math
import string
from collections.abc import Iterable, Mapping

from qlora_lite.errors import DataError

_NO_NAME = frozenset("{}!:")  # what ``string.Formatter`` takes apart


def text_of(holder: Mapping[str, object], key: str) -> str:
    """Return the text of a field.

    Raises:
        DataError: it is missing, null, empty or no text.
    """
    value = holder.get(key)
    if value is None:
        raise DataError(f"{key!r} is missing or null; every row needs it")
    if not isinstance(value, str):
        raise DataError(f"{key!r} is {kind_of(value)}, not text; {_cure(value)}")
    if not value.strip():
        raise DataError(f"{key!r} is empty; fill it in or remove the row")
    return value


def _cure(value: object) -> str:
    if isinstance(value, list) and any(isinstance(turn, dict) and "role" in turn for turn in value):
        return 'write all turns of the row as one list, {"messages": [...]}, which is format messages'
    return "write it as text" if isinstance(value, list | dict) else "put it in quotes"


def kind_of(value: object) -> str:
    """Name the kind of a value in the words of JSON."""
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def fill(template: str | None, row: Mapping[str, object]) -> str:
    """Fill the {column} places of a template; only plain names, so that it cannot reach into objects.

    Args:
        template: the text; "{{" is a brace.
        row: column to value; numbers are written as Python writes them.

    Raises:
        DataError: the template is not balanced, names no column, or gives an empty text, or a number is not finite.
    """
    parts = []
    for literal, column, spec, conversion in _pieces(template, row):
        parts.append(literal)
        if column is None:
            continue
        if column not in row or spec or conversion:
            columns = f"the columns are {', '.join(row)}{_cure_of_name(template, row)}"
            raise DataError(f"the template {template!r} names {{{column}}}; {columns}")
        parts.append(_written(row, column))
    filled = "".join(parts)
    if not filled.strip():
        raise DataError(f"the template {template!r} gives an empty text for this row")
    return filled


def _written(row: Mapping[str, object], column: str) -> str:
    value = row[column]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{column!r} is {value}, not a finite number; fill it in or remove the row")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else text_of(row, column)


def columns_of(template: str | None) -> list[str]:
    """Return the columns that a template names.

    Raises:
        DataError: the template is not balanced.
    """
    return [column for _, column, _, _ in _pieces(template) if column is not None]


def _pieces(template: str | None, columns: Iterable[str] = ()) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template or ""))
    except ValueError as error:
        cure = f"write {{{{ for a brace{_cure_of_name(template, columns)}"
        raise DataError(f"the template {template!r} is not balanced ({error}); {cure}") from None


def _cure_of_name(template: str | None, columns: Iterable[str]) -> str:
    """Say what to do about a column that this template means and none can name; "" if there is no such column."""
    odd = next((name for name in columns if f"{{{name}}}" in (template or "") and not _NO_NAME.isdisjoint(name)), None)
    return f"; rename the column {odd!r}: no template can name one with {{, }}, ! or : in it" if odd else ""


def without_absent(value: object) -> object:
    """Return a value without the keys of nested objects whose value is null.

    Parquet and Arrow store nested objects with one set of keys per column: an object without a key comes back with a
    null there, so the tool schemas of a file all get each other's keys. A null inside an object cannot be told from an
    absent key; it is read as absent, which is what the rows had before they were written. (Where a null is meant, keep
    the schema as JSON text: a column "tools" of text is parsed.) A null in a list stays, and so does one that is the
    value of a whole column.
    """
    if isinstance(value, dict):
        return {key: without_absent(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_absent(item) for item in value]
    return value
