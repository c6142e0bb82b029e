"""What of a recipe the training loop and the planner take as it is: the loop's settings and memory options."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from qlora_lite.constraints import WITH_COMPILE
from qlora_lite.errors import CheckpointError
from qlora_lite.models.memory_options import MemoryOptions, memory_options_of
from qlora_lite.recipe.load import require_recipe
from qlora_lite.recipe.schema import FORMER_NAMES, Recipe
from qlora_lite.train.settings import TrainSettings

from .task import find_task, packs, sequence_tokens

MICRO_BATCHES = "micro_batch_size", "gradient_accumulation_steps"


def train_settings(recipe: Recipe) -> TrainSettings:
    """Return the loop's settings from a recipe.

    Raises:
        RecipeError: it is no recipe.
    """
    require_recipe(recipe)
    values = recipe.data.model_dump() | recipe.train.model_dump() | recipe.memory.model_dump()
    values["options"] = MemoryOptions(**fixed_options(recipe))
    values["learning_rate"] = learning_rate(recipe)
    values["max_tokens"], values["packing"] = sequence_tokens(recipe), packs(recipe)
    names = (field.name for field in fields(TrainSettings) if field.name != "shares")
    return TrainSettings(**{name: values[name] for name in names})


def learning_rate(recipe: Recipe) -> float:
    """Return the peak learning rate that a recipe sets, or that auto means for its model and what is trained.

    Raises:
        ModelError: see ``Task.auto_learning_rate``.
    """
    stated = recipe.train.learning_rate
    return find_task(recipe).auto_learning_rate(recipe) if stated == "auto" else stated


def fixed_options(recipe: Recipe) -> dict[str, Any]:
    """Return the memory options that a recipe sets, by the names of ``MemoryOptions``; those left to the planner are
    not in it."""
    values = recipe.memory.model_dump() | {"compile": recipe.train.compile}
    return memory_options_of(values | WITH_COMPILE if recipe.train.compile else values)  # each is that or "auto"


def with_plan(recipe: Recipe, options: Mapping[str, object], micro_batches: bool = True) -> Recipe:
    """Return a recipe with an earlier plan's memory options in place of those it leaves open.

    Args:
        options: settings by dotted key, as ``planning.candidate.Candidate.settings`` gives them.
        micro_batches: take those of the plan, too. Pictures are evaluated in batches of the recipe's own size.

    Raises:
        CheckpointError: a memory option is unknown or invalid.
    """
    sections: dict[str, dict] = {"memory": {"micro_batches": "as-given"}, "train": {}}
    try:
        for key, value in options.items():
            section, _, name = FORMER_NAMES.get(key, key).partition(".")
            if micro_batches or name not in MICRO_BATCHES:
                sections[section][name] = value
        changed = {
            name: type(getattr(recipe, name)).model_validate(getattr(recipe, name).model_dump() | values)
            for name, values in sections.items()
        }
    except (KeyError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"the plan on record is not one that this version makes: {error!r}") from None
    return recipe.model_copy(update=changed)
