"""An objective as a recipe names it: what is asked of ``train.objective``, and its one lookup.

The name is found in the group ``qlora_lite.objectives`` (``registry``), the package's own likewise. Recipes are checked
without torch, so a module that defines an entry imports it within methods alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lite.recipe.part import Part
from qlora_lite.recipe.schema import Recipe
from qlora_lite.registry import find

if TYPE_CHECKING:
    from torch import nn

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.readers.problems import RowProblem
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.train.model_spec import ModelSpec
    from qlora_lite.train.objective import Objective
    from qlora_lite.train.settings import TrainSettings
    from qlora_lite.train.workload import Workload


class ObjectiveEntry(Part):
    """A value of ``train.objective``: what a language model learns by.

    Args:
        preference: what examples are compared or judged by, "pairs" or "labels"; None where answers are imitated.
        needs_reference: whether answers are compared with what the model gave them before training.
        answers: whether the model itself answers prompts in each step.
        rate_share: the learning rate that auto means, as a share of the method's own.
    """

    preference: str | None = None
    needs_reference: bool = False
    answers: bool = False
    rate_share: float = 1.0

    def objective(self, recipe: Recipe) -> Objective:
        """Return the loss of a language model's target tokens, with the settings of a recipe."""
        raise NotImplementedError

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return a language model that learns by the objective; the default is that of target tokens.

        Args:
            spec: of the model, for a plan.
        """
        from qlora_lite.train.causal_lm import causal_lm

        return causal_lm(method, self.objective(recipe), spec)

    def ready(self, work: Workload, recipe: Recipe, tokenizer: Any, end_token_ids: Collection[int]) -> Workload:
        """Return the workload of a plan with what training needs and a plan does not."""
        return work.read_by(tokenizer)

    def attach(
        self, recipe: Recipe, model: nn.Module, adapter: Path, tokenizer: Any, settings: TrainSettings
    ) -> dict[str, float]:
        """Add an adapter to a base model; return what of evaluation rows is measured with and without it."""
        from qlora_lite.adapters.files import load_adapter

        load_adapter(model, adapter, recipe.train.merge_aware)
        return {}

    def row_faults(self, recipe: Recipe, *parts: Dataset | None) -> Iterator[RowProblem]:
        """Yield what of the rows does not fit the objective."""
        return iter(())

    def identity(self, recipe: Recipe) -> dict[str, str]:
        """Return digests of what else decides the result, such as code of the user's; nothing of it is run."""
        return {}

    def check(self, recipe: Recipe) -> None:
        """Check, before anything large is loaded, that what the objective needs is there.

        Raises:
            RecipeError: it is not.
        """


def find_objective(recipe: Recipe) -> ObjectiveEntry:
    """Return what a recipe names in ``train.objective``.

    Raises:
        ExtensionError, ModelError: see ``registry.find``.
    """
    return find("objectives", recipe.train.objective, ObjectiveEntry)
