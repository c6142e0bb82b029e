"""What a recipe's task section means: the head, the labels that the rows have, and what is wrong with them."""

from collections.abc import Iterator

from qlora_lite.data.examples import Dataset
from qlora_lite.data.labels import MAX_NAMES, NUMBER, ONE_LABEL, balance, label_names, names_of
from qlora_lite.data.problems import RowProblem
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.nested import LanguagePart
from qlora_lite.models.skeleton import read_part
from qlora_lite.recipe.schema import Recipe

UNKNOWN_LABEL, ONE_CLASS, MANY_LABELS = "label without an output", "one label in all rows", "more labels than classes"
PLANNED_LABELS = ("0", "1")  # where no row is known yet; others take a few hundred bytes each


def head_of(recipe: Recipe) -> Head | None:
    """Return the head that a recipe asks for; None of a language model."""
    if recipe.problem is None:
        return None
    labels = ("number",) if recipe.problem == NUMBER else recipe.task.labels or PLANNED_LABELS
    return Head(recipe.problem, labels, recipe.train.seed)


def part_of(recipe: Recipe) -> LanguagePart:
    """Return a recipe's model without its weights, with the head that it asks for; see ``models.skeleton.read_part``.

    Raises:
        ModelError: see ``read_part`` and ``models.heads.with_head``.
    """
    return with_head(read_part(recipe.model.path, recipe.model.revision), head_of(recipe))


def with_labels(recipe: Recipe, data: Dataset) -> Recipe:
    """Return a recipe with the names of its rows' labels, if it asks for those."""
    if recipe.problem in (None, NUMBER) or recipe.task.labels is not None:
        return recipe
    names = label_names(data.examples, recipe.problem)
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"labels": names})})


def label_faults(recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> Iterator[RowProblem]:
    """Yield what makes labels useless for training.

    Args:
        recipe: with the names of its labels.
    """
    problem, names = recipe.problem, recipe.task.labels or ()
    if problem in (None, NUMBER) or not len(data.examples):
        return
    if problem == ONE_LABEL and len(names) == 1:
        yield RowProblem("", f"all rows have the label {names[0]!r}, so that there is nothing to learn", ONE_CLASS)
    if len(names) > MAX_NAMES or (problem == ONE_LABEL and len(names) > max(20, len(data.examples) // 2)):
        message = (f"{len(names):,} different labels in {len(data.examples):,} rows are no classes; for numbers write "
                   "task.kind: regression")  # fmt: skip
        yield RowProblem("", message, MANY_LABELS)
        return
    known = {*names}
    for part in filter(None, (data, eval_data)):
        for example in part.examples:
            if unknown := next((name for name in names_of(example, problem) if name not in known), None):
                message = f"the label {unknown!r} is none of those that are trained: {', '.join(names)}"[:500]
                yield RowProblem(example.where, message, UNKNOWN_LABEL)
                break


def balance_of(recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> dict | None:
    """Return how the labels of training and evaluation rows are spread; None of a language model."""
    if recipe.problem is None:
        return None
    found = {"kind": recipe.task.kind, "train": balance(data.examples, recipe.problem)}
    return found | ({"eval": balance(eval_data.examples, recipe.problem)} if eval_data else {})
