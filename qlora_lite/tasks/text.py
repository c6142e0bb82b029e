"""The task of a language model, which learns to write text: task.kind language-model, with its usual objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_lite.prepare.objective import ObjectiveEntry, find_objective
from qlora_lite.prepare.task import Task
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.tokens.storage import Example
    from qlora_lite.prepare.moment import Measured, Moment, Watch
    from qlora_lite.train.model_spec import ModelSpec
    from qlora_lite.train.objective import Objective
    from qlora_lite.train.workload import Workload


class Text(Task):
    """A causal language model."""

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the language model with the objective of the recipe."""
        return find_objective(recipe).workload(recipe, method, spec)

    def ready(
        self, work: Workload, recipe: Recipe, reader: Any, rows: Sequence[Example], end_token_ids: Collection[int]
    ) -> Workload:
        """See ``ObjectiveEntry.ready``."""
        return find_objective(recipe).ready(work, recipe, reader, end_token_ids)

    def metrics(self, moment: Moment) -> Measured | None:
        """See ``inference.course.text_metrics``."""
        from qlora_lite.inference.course import text_metrics

        return text_metrics(moment)

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Any, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """See ``inference.evaluate.measure_text``."""
        from qlora_lite.inference.evaluate import measure_text

        return measure_text(recipe, adapter, rows, reader, watch, held_out)


class FineTuning(ObjectiveEntry):
    """Cross-entropy: answers are imitated."""

    def objective(self, recipe: Recipe) -> Objective:
        """Return the cross-entropy."""
        from qlora_lite.train.causal_lm import CrossEntropy

        return CrossEntropy()


TEXT, SFT = Text(), FineTuning()
