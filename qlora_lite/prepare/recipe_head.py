"""The head that a recipe's task section asks for, and the model with it."""

from qlora_lite.data.labels import NUMBER
from qlora_lite.models.heads import Head, with_head
from qlora_lite.models.nested import LanguagePart
from qlora_lite.models.skeleton import read_part
from qlora_lite.recipe.schema import REWARD_LABEL, Recipe

PLANNED_LABELS = ("0", "1")  # where no row is known yet; others take a few hundred bytes each


def head_of(recipe: Recipe) -> Head | None:
    """Return the head that a recipe asks for; None of a language model."""
    if recipe.problem is None:
        return None
    if recipe.task.kind == "reward":
        labels: tuple[str, ...] = (REWARD_LABEL,)
    else:
        labels = ("number",) if recipe.problem == NUMBER else recipe.task.labels or PLANNED_LABELS
    return Head(recipe.problem, labels, recipe.train.seed)


def part_of(recipe: Recipe) -> LanguagePart:
    """Return a recipe's model without its weights, with the head that it asks for; see ``models.skeleton.read_part``.

    Raises:
        ModelError: see ``read_part`` and ``models.heads.with_head``.
    """
    return with_head(read_part(recipe.model.path, recipe.model.revision), head_of(recipe))
