"""Labels of texts: what a row's label is called, which number it has in a head's outputs, and how they are spread.

A label is kept as text in ``Example.answer``: a name or number as the file has it, of several labels a JSON list, of a
number its shortest decimal form. Numbers of outputs follow from the names of the training rows, in order, so that
nothing but the list of names has to be kept beside a model.
"""

import json
import math
import re
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

from qlora_lite.data.readers.fields import kind_of
from qlora_lite.data.readers.json_rows import decode_text
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError

# Kinds of problem, in transformers' words (``config.problem_type``).
ONE_LABEL, LABELS, NUMBER = "single_label_classification", "multi_label_classification", "regression"
MASKS = "segmentation"  # for which transformers has no word: each pixel of a picture has a label, see ``masks``
_WITHOUT = "-1"  # what the test sets of GLUE have in place of a label
MAX_NAMES = 1000  # more are no classes
CURE_OF_MULTI_HOT = "write the names of the row's classes, each once, not zeros and ones for all classes (multi-hot)"
_NO_COMMA = re.compile(r"""['"]\s+['"]""")  # as NumPy writes arrays; Python would join the two names


def label_text(value: object, problem: str) -> str:
    """Return a row's label as text.

    Args:
        value: as the row has it; of LABELS a list, or text: a list as JSON or Python writes it, or names with commas.
        problem: ONE_LABEL, LABELS or NUMBER.

    Raises:
        DataError: it is missing, or not of the problem's kind.
    """
    if value is None:
        raise DataError("the label is missing or null; every row needs it")
    if problem == NUMBER:
        return repr(_number(value))
    if problem == ONE_LABEL:
        return _name(value)
    if isinstance(value, str):
        value = _listed(value.strip())
    if not isinstance(value, list):
        raise DataError(f"the labels are {kind_of(value)}; write a list of names, or names with commas between them")
    names = sorted(map(_name, value))
    if twice := next((name for name, other in pairwise(names) if name == other), None):
        raise DataError(f"the label {twice!r} stands twice; {CURE_OF_MULTI_HOT}")
    return json.dumps(names, ensure_ascii=False)


def _listed(text: str) -> object:
    """Return the list that a text holds."""
    if not (text.startswith("[") and text.endswith("]")):
        return [part for part in map(str.strip, text.split(",")) if part]
    with suppress(ValueError, RecursionError):
        return decode_text(text)
    with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval raises
        if not _NO_COMMA.search(text):
            return literal_eval(text)
    raise DataError(
        f"the labels {text[:100]!r} are in brackets but are no list in JSON or Python; write "
        """["a", "b"], or names with commas and no brackets"""
    )


def label_if_any(value: object, problem: str) -> str | None:
    """Return a row's label as text; None where it has none: null, NaN, empty, or of one label -1.

    Args:
        value, problem: see ``label_text``.
    """
    is_blank = problem != LABELS and isinstance(value, str) and not value.strip()
    is_without = problem == ONE_LABEL and value in (-1, _WITHOUT)
    is_null = value is None or (isinstance(value, float) and math.isnan(value))  # NaN in a column of numbers
    return None if is_null or is_blank or is_without else label_text(value, problem)


def _name(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"the label is {value}, not a name or a finite number; fill it in or remove the row")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise DataError(f"the label is {kind_of(value)}, not a name or number")
    name = str(value).strip()
    if not name:
        raise DataError("the label is empty; fill it in or remove the row")
    if name == _WITHOUT:
        cure = "remove the row, or give the class another name if it is one"
        raise DataError(f"the label -1 marks a row without one, as in the test sets of GLUE; {cure}")
    return name


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"the label {value!r} is not a finite number, which task.kind regression needs"[:200])
    return number


def names_of(example: Example, problem: str) -> list[str]:
    """Return the labels of an example: one, or any number of LABELS and of MASKS."""
    if problem == MASKS:
        return json.loads(example.answer)["classes"]
    return json.loads(example.answer) if problem == LABELS else [example.answer]


def label_names(examples: Iterable[Example], problem: str) -> tuple[str, ...]:
    """Return the names of all labels of some examples in order: numbers by size before other names by letter."""
    names = {name for example in examples for name in names_of(example, problem)}
    return tuple(sorted(names, key=_rank))


def _rank(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (False, number, name) if math.isfinite(number) else (True, 0.0, name)


def target_of(example: Example, problem: str, numbers: Mapping[str, int]) -> int | float | list[float]:
    """Return what a head's outputs are compared with: the label's number, 0 or 1 for each of several, or a number.

    Args:
        numbers: of the labels, by name.

    Raises:
        DataError: a label has no number.
    """
    if problem == NUMBER:
        return float(example.answer)
    names = names_of(example, problem)
    if unknown := next((name for name in names if name not in numbers), None):
        raise DataError(f"{example.where}: the label {unknown!r} is none of {', '.join(numbers)}"[:500])
    if problem == ONE_LABEL:
        return numbers[names[0]]
    return [float(name in names) for name in numbers]


def balance(examples: Sequence[Example], problem: str) -> dict:
    """Return how labels are spread, and what always giving the commonest answer would reach.

    Of NUMBER the mean and what its error would be.
    """
    if problem == NUMBER:
        values = [float(example.answer) for example in examples]
        mean = math.fsum(values) / max(1, len(values))
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values)))
        return {
            "mean": mean,
            "standard_deviation": deviation,
            "smallest": min(values, default=0.0),
            "largest": max(values, default=0.0),
        }
    counts = Counter(name for example in examples for name in names_of(example, problem))
    shown = {name: counts[name] for name in sorted(counts, key=_rank)}
    if problem == MASKS:
        return {"counts": shown}  # pictures that have a class in them
    if problem == LABELS:
        whole = Counter(example.answer for example in examples)
        return {"counts": shown, "baseline_accuracy": max(whole.values(), default=0) / max(1, len(examples))}
    return {"counts": shown, "baseline_accuracy": max(counts.values(), default=0) / max(1, len(examples))}
