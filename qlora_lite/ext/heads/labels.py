"""The labels of rows: their names, how they are spread, and what is wrong with them. Needs no torch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

from qlora_lite.data.labelled_rows import FORMAT, columns_for
from qlora_lite.data.labels import (
    CURE_OF_MULTI_HOT,
    LABELS,
    MASKS,
    MAX_NAMES,
    NUMBER,
    ONE_LABEL,
    balance,
    label_names,
    names_of,
)
from qlora_lite.data.readers.data_files import left_out
from qlora_lite.data.readers.fields import columns_of
from qlora_lite.data.readers.problems import Problems, RowProblem
from qlora_lite.data.readers.sources import Source, read_rows
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.data.tokens.statistics import unused_of
from qlora_lite.errors import DataError
from qlora_lite.prepare.text_rows import files_not_read, first_names
from qlora_lite.recipe.schema import Recipe

UNKNOWN_LABEL, ONE_CLASS, MANY_LABELS = "label without an output", "one label in all rows", "more labels than classes"
RARE_LABEL = "label that a single row has"
_SHOWN = 5  # names


def named(recipe: Recipe, data: Dataset, problem: str) -> Recipe:
    """Return a recipe with the names of its rows' labels, if it asks for those."""
    if problem == NUMBER or recipe.task.labels is not None:
        return recipe
    names = label_names(data.examples, problem)
    if problem == MASKS:  # whose numbers are the classes' own
        names = tuple(map(str, range(1 + max(map(int, names), default=-1))))
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": names})})


def faults(recipe: Recipe, data: Dataset, eval_data: Dataset | None, problem: str) -> Iterator[RowProblem]:
    """Yield what makes labels useless for training.

    Args:
        recipe: with the names of its labels.
    """
    names = recipe.task.labels or ()
    if problem == NUMBER or not len(data.examples):
        return
    if problem in (ONE_LABEL, MASKS) and len(names) == 1:
        message = f"all rows have the label {names[0]!r}, so that there is nothing to learn; give rows of others too"
        yield RowProblem("", ONE_CLASS, message)
    # Zeros and ones for more classes than two, or for two that are alike, are an error of their row.
    if problem == LABELS and {*names} == {"0", "1"} and all(len(names_of(e, problem)) == 2 for e in data.examples):
        yield RowProblem("", ONE_CLASS, f"all rows have the labels 0 and 1; {CURE_OF_MULTI_HOT}")
    if len(names) > MAX_NAMES or (problem == ONE_LABEL and len(names) > max(20, len(data.examples) // 2)):
        message = (
            f"{len(names):,} different labels in {len(data.examples):,} rows are no classes; for numbers write "
            "task.kind: regression"
        )
        yield RowProblem("", MANY_LABELS, message)
        return
    known = set(map(str, range(len(names)))) if problem == MASKS else {*names}
    shown = [f"{i} ({name})" if problem == MASKS and name != str(i) else name for i, name in enumerate(names)]
    for part in filter(None, (data, eval_data)):
        for example in part.examples:
            if unknown := next((name for name in names_of(example, problem) if name not in known), None):
                message = f"the label {unknown!r} is none of those that are trained: {', '.join(shown)}"[:500]
                if part is data:
                    cure = "name it in task.labels, or correct it"
                elif recipe.data.eval_share:
                    cure = "data.eval_share held out all rows with it: give more of them, or data.eval"
                else:
                    cure = "give training rows with it, or correct it"
                yield RowProblem(example.where, UNKNOWN_LABEL, f"{message}; {cure}")
                break


def rare(recipe: Recipe, data: Dataset, problem: str) -> Iterator[RowProblem]:
    """Yield a warning of classes that only one training row has."""
    if problem not in (ONE_LABEL, LABELS) or recipe.data.streaming:
        return
    places: dict[str, set[str]] = {}  # a row that is repeated by a weight is one row
    for example in data.examples:
        for name in names_of(example, problem):
            places.setdefault(name, set()).add(example.where)
    if alone := [name for name in sorted(places) if len(places[name]) == 1]:
        names = ", ".join(alone[:_SHOWN]) + (", ..." if len(alone) > _SHOWN else "")
        message = f"only one row has the label {names}; give more rows of it, or leave it out"
        yield RowProblem(min(places[alone[0]]), RARE_LABEL, message)


def spread(recipe: Recipe, data: Dataset, eval_data: Dataset | None, problem: str) -> dict:
    """Return how the labels of training and evaluation rows are spread."""
    found = {"kind": recipe.task.kind, "train": balance(data.examples, problem)}
    return found | ({"eval": balance(eval_data.examples, problem)} if eval_data else {})


def describe_source(source: Source, unused: Mapping[str, Counter[str]]) -> dict:
    """Describe a source of labelled texts: their columns, and those that are not used."""
    notes = files_not_read(source, left_out(source.path))
    with suppress(DataError, StopIteration, OSError):  # the rows were read before: what is wrong is among the problems
        where, row = next(read_rows(source, Problems()))
        if columns := columns_for(row, where, source):
            notes.append(f"text: {' and '.join(columns.texts)}; label: {columns.label}")
        used = columns.names if columns else columns_of(source.prompt) + columns_of(source.completion)
        notes += [f"{what} not used: {first_names(names)}" for what, names in unused_of(unused, used)]
    return {"path": source.path, "format": FORMAT, "weight": source.weight, "notes": notes}
