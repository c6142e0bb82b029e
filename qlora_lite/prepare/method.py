"""An adapter method as a recipe names it: what is asked of ``adapter.method``, and its one lookup.

The name is found in the group ``qlora_lite.methods`` (``registry``), the package's own likewise. Recipes are checked
without torch, so a module that defines an entry imports it within methods alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_lite.recipe.part import Part
from qlora_lite.recipe.schema import Recipe
from qlora_lite.registry import find

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod


class MethodEntry(Part):
    """A value of ``adapter.method``.

    Args:
        label: what people call the method.
        trains_base: whether it trains the model's own weights, so that a run leaves a model and no adapter.
        has_targets: whether ``lora.targets`` says which layers it adapts.
        rate_share: the learning rate that auto means, as a share of LoRA's with alpha 32.
        peft_types: see ``adapters.saved.SavedMethod``.
    """

    label: str = ""
    trains_base: bool = False
    has_targets: bool = False
    rate_share: float = 1.0
    peft_types: tuple[str, ...] = ()

    def read(self, config: Mapping) -> AdapterMethod:
        """See ``adapters.saved.SavedMethod``."""
        raise NotImplementedError

    def build(self, recipe: Recipe) -> AdapterMethod:
        """Return the method with the settings of a recipe.

        Raises:
            ModelError: the model has no part that a setting names.
        """
        raise NotImplementedError

    def virtual_tokens(self, recipe: Recipe) -> int:
        """Return how many virtual tokens stand before every row."""
        return 0

    def auto_learning_rate(self, recipe: Recipe, family: str, width: int) -> float:
        """Return the peak learning rate that auto means.

        Args:
            family: transformers' ``model_type``.
            width: the hidden size.
        """
        from qlora_lite.train.settings import method_learning_rate

        return method_learning_rate(family, width, self.rate_share)

    def size(self, recipe: Recipe) -> str:
        """Return in a few words how much is trained, for the title of a plan."""
        return self.label


def find_method(recipe: Recipe) -> MethodEntry:
    """Return what a recipe names in ``adapter.method``.

    Raises:
        ExtensionError, ModelError: see ``registry.find``.
    """
    return find("methods", recipe.adapter.method, MethodEntry)


def virtual_tokens(recipe: Recipe) -> int:
    """Return how many virtual tokens a recipe puts before every row."""
    return find_method(recipe).virtual_tokens(recipe)


def build_method(recipe: Recipe) -> AdapterMethod:
    """Return the adapter method of a recipe; see ``MethodEntry.build``."""
    return find_method(recipe).build(recipe)
