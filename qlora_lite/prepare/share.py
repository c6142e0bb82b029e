"""What one of several processes does of a recipe's step, without torch: asked before any is started."""

from collections.abc import Sequence

from qlora_lite.errors import RecipeError
from qlora_lite.recipe.schema import Recipe

from .method import find_method


def check_packs(recipe: Recipe, speeds: Sequence[float]) -> None:
    """Check that ranks can share the packs of a recipe's steps: all have as many, or of unequal GPUs one at least.

    Raises:
        RecipeError: they cannot.
    """
    is_dealt = len({*speeds}) > 1 and not recipe.memory.optimizer_in_backward
    packs = recipe.train.micro_batch_size * recipe.train.gradient_accumulation_steps
    if not is_dealt or packs < len(speeds):
        share_of(recipe, len(speeds))


def share_of(recipe: Recipe, world_size: int) -> Recipe:
    """Return the recipe of one rank's part of each step.

    Raises:
        RecipeError: a step's packs cannot be divided by so many ranks.
    """
    t = recipe.train
    if world_size == 1:
        return recipe
    in_backward, packs = recipe.memory.optimizer_in_backward, t.micro_batch_size * t.gradient_accumulation_steps
    if in_backward and not _divides_in_backward(recipe):
        raise RecipeError(
            "memory.optimizer_in_backward updates each weight before several processes have added up its "
            "gradient, but for weights that they divide (adapter.method full without switch_every, "
            "memory.stream_from and memory.resident_layers left out): train in one process, or leave it "
            "out"
        )
    if in_backward and packs % world_size:
        more = -(-packs // world_size) * world_size
        raise RecipeError(
            f"{world_size} processes cannot share a micro-batch of {packs}: set train.micro_batch_size to {more}"
        )
    if packs % world_size:
        more = -(-packs // world_size) * world_size
        raise RecipeError(
            f"{world_size} processes cannot share the {packs} packs of a step: set train.gradient_accumulation_steps "
            f"to {more} with train.micro_batch_size 1, or start a number of processes that divides {packs}"
        )
    return with_packs(recipe, packs // world_size)


def _divides_in_backward(recipe: Recipe) -> bool:
    memory = recipe.memory
    asks_for_it = memory.stream_from in ("auto", "ranks") and memory.resident_layers in ("auto", 0)
    return find_method(recipe).trains_base and not recipe.adapter.switch_every and asks_for_it


def with_packs(recipe: Recipe, packs: int, runs: int | None = None) -> Recipe:
    """Return a recipe with so many packs in a step: in so many micro-batches, or as large ones as it has itself."""
    sizes = range(1, recipe.train.micro_batch_size + 1)
    size = packs // runs if runs else max(size for size in sizes if packs % size == 0)
    changes = {"micro_batch_size": size, "gradient_accumulation_steps": packs // size}
    memory = recipe.memory.model_copy(update={"micro_batches": "as-given"} if runs else {})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes), "memory": memory})
