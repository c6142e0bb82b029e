"""What a recipe trains, and its training step as the planner takes it."""

from qlora_lite.planning.machine import Machine
from qlora_lite.planning.simulate import Job
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.model_spec import ModelSpec
from qlora_lite.train.workload import Workload

from .method import build_method
from .task import find_task


def build_workload(recipe: Recipe, spec: ModelSpec | None = None) -> Workload:
    """Return what a recipe trains.

    Args:
        spec: of the model, for a plan.
    """
    return find_task(recipe).workload(recipe, build_method(recipe), spec)


def likelihood_workload(recipe: Recipe, virtual_tokens: int = 0) -> Workload:
    """Return what computes the likelihood of a recipe's answers, whatever it learns them by.

    Args:
        virtual_tokens: that the model puts before each row.
    """
    return find_task(recipe).likelihood_workload(recipe, virtual_tokens)


def build_job(recipe: Recipe, machine: Machine, eval_shape: BatchShape | None) -> Job:
    """Return a recipe's training step for the planner; the shape of its micro-batches is the planner's to set.

    Args:
        machine: planned for.
        eval_shape: of the largest evaluation batch, None without one.

    Raises:
        ModelError: see ``Task.plan_workload``.
    """
    t = recipe.train
    return Job(
        workload=find_task(recipe).plan_workload(recipe, build_method(recipe), machine),
        shape=BatchShape((1,), 1),
        eval_shape=eval_shape,
        device_type=machine.device_type,
        optimizer=t.optimizer,
        stochastic_rounding=t.stochastic_rounding,
        max_grad_norm=t.max_grad_norm,
        loraplus_lr_ratio=t.loraplus_lr_ratio,
        deterministic=t.deterministic,
        saved_adapters=1 if eval_shape is None else 2,
        capability=machine.compute_capability,
    )
