"""The tasks that put a head on a model of text: one label of several, any number of them, a number, or a reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lite.prepare.task import Labels, ReportPart, Task
from qlora_lite.recipe.combinations import refused
from qlora_lite.recipe.part import Found, Value
from qlora_lite.recipe.schema import Recipe

if TYPE_CHECKING:
    from qlora_lite.adapters.method import AdapterMethod
    from qlora_lite.data.readers.problems import RowProblem
    from qlora_lite.data.readers.sources import Source
    from qlora_lite.data.tokens.examples import Dataset
    from qlora_lite.models.heads import Head
    from qlora_lite.prepare.moment import LabelledRows, Measured, Moment, Watch
    from qlora_lite.train.model_spec import ModelSpec, TransformerSpec
    from qlora_lite.train.workload import Workload

ONE_LABEL, LABELS, NUMBER = "single_label_classification", "multi_label_classification", "regression"
REWARD_LABEL = "reward"  # of the one output of a reward model
PLANNED_LABELS = ("0", "1")  # where no row is known yet; others take a few hundred bytes each


class HeadLabels(Labels):
    """Labels that a head gives."""

    def name(self, recipe: Recipe, data: Dataset) -> Recipe:
        """See ``labels.named``."""
        from .labels import named

        return named(recipe, data, self.kind)

    def faults(self, recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> Iterator[RowProblem]:
        """See ``labels.faults``."""
        from .labels import faults

        return faults(recipe, data, eval_data, self.kind)

    def warnings(self, recipe: Recipe, data: Dataset) -> Iterator[RowProblem]:
        """See ``labels.rare``."""
        from .labels import rare

        return rare(recipe, data, self.kind)

    def balance(self, recipe: Recipe, data: Dataset, eval_data: Dataset | None) -> dict:
        """See ``labels.spread``."""
        from .labels import spread

        return spread(recipe, data, eval_data, self.kind)


class LabeledText(Task):
    """Texts, or pairs of texts, with a label each.

    Args:
        problem: what the head is for, in transformers' words.
        outputs: names of the head's outputs; None are the labels of the training rows.
    """

    has_head = True
    writes_text = False

    def __init__(self, problem: str, outputs: tuple[str, ...] | None = None) -> None:
        self.problem, self.outputs, self.labels = problem, outputs, HeadLabels(problem)
        self.settings = () if outputs else ("task.labels",)

    def conflicts(self, value: Value) -> Found:
        """See ``rules``."""
        from .rules import labels, no_text

        if self.settings:
            yield from labels(value, self.problem == ONE_LABEL)
        yield from no_text(value)

    def head(self, recipe: Recipe) -> Head:
        """Return the head, with the labels of the recipe or those that stand for them in a plan."""
        from qlora_lite.models.heads import Head

        return Head(self.problem, self.outputs or recipe.task.labels or PLANNED_LABELS, recipe.train.seed)

    def spec_type(self) -> type[TransformerSpec]:
        """See ``Task``."""
        from .text import TextHeadSpec

        return TextHeadSpec

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the model with its head."""
        from .text import text_head

        return text_head(method, self.problem, self.head(recipe).labels, spec)

    def trained(self, adapter: Mapping, model: Mapping, labels: Sequence[str] | None) -> bool:
        """See ``Task``."""
        is_of_kind = adapter.get("task_type") == "SEQ_CLS" and model.get("problem_type") == self.problem
        return is_of_kind and labels != (REWARD_LABEL,)

    def check_first_row(self, recipe: Recipe, source: Source) -> str:
        """See ``Task``."""
        from qlora_lite.data.labelled_rows import FORMAT, read_labelled
        from qlora_lite.data.readers.problems import Problems

        problems = Problems()
        next(read_labelled(source, problems, self.problem), None)
        problems.raise_if_any()
        return FORMAT

    def describe_source(self, recipe: Recipe, source: Source, unused: Mapping[str, Counter[str]]) -> dict:
        """See ``labels.describe_source``."""
        from .labels import describe_source

        return describe_source(source, unused)

    def metrics(self, moment: Moment) -> Measured | None:
        """See ``measure.head_metrics``."""
        from .measure import head_metrics

        return head_metrics(moment)

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Any, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """See ``measure.evaluate_head``."""
        from .measure import evaluate_head

        return evaluate_head(recipe, adapter, reader, watch, held_out)

    def label(self, recipe: Recipe, adapter: Path | None, reader: Any, rows: str | Path, out: Path) -> LabelledRows:
        """See ``predict.label_texts``."""
        from .predict import label_texts

        return label_texts(recipe, adapter, reader, rows, out, self.problem)

    def report(self, folder: Path, summary: Mapping[str, Any]) -> list[ReportPart]:
        """Return confusion matrices."""
        from .report import NOTE, confusion

        return [ReportPart("Labels", confusion(summary), NOTE)]

    def summary(self, recipe: Recipe, reader: Any) -> dict[str, Any]:
        """Return the labels."""
        return {"labels": [*self.head(recipe).labels]}


class Reward(Task):
    """Pairs of chats, of which the chosen one is to be given the higher number."""

    has_head = True
    writes_text = False
    preference = "pairs"

    def conflicts(self, value: Value) -> Found:
        """See ``rules``."""
        from qlora_lite.ext.preferences.entry import NEEDS, WHY

        from .rules import OF_CHATS, no_text

        yield from no_text(value, but=OF_CHATS)
        yield from refused(value, NEEDS, "task.kind reward", WHY)

    def head(self, recipe: Recipe) -> Head:
        """Return the head, whose one output is the reward."""
        from qlora_lite.models.heads import Head

        return Head(NUMBER, (REWARD_LABEL,), recipe.train.seed)

    def trained(self, adapter: Mapping, model: Mapping, labels: Sequence[str] | None) -> bool:
        """See ``Task``."""
        is_of_kind = adapter.get("task_type") == "SEQ_CLS" and model.get("problem_type") == NUMBER
        return is_of_kind and labels == (REWARD_LABEL,)

    def spec_type(self) -> type[TransformerSpec]:
        """See ``Task``."""
        from .text import TextHeadSpec

        return TextHeadSpec

    def workload(self, recipe: Recipe, method: AdapterMethod, spec: ModelSpec | None = None) -> Workload:
        """Return the model with its head, and the loss of pairs."""
        from .reward import reward_model

        return reward_model(method, REWARD_LABEL, spec)

    def evaluate(
        self, recipe: Recipe, adapter: Path | None, rows: int, reader: Any, watch: Watch | None, held_out: str | None
    ) -> tuple[dict[str, Any], Sequence[dict]]:
        """Measure the objective, which says all of a reward model."""
        from .measure import evaluate_head

        return evaluate_head(recipe, adapter, reader, watch, held_out, score=None)

    def label(self, recipe: Recipe, adapter: Path | None, reader: Any, rows: str | Path, out: Path) -> LabelledRows:
        """See ``predict.score_chats``."""
        from .predict import score_chats

        return score_chats(recipe, adapter, reader, rows, out)

    def summary(self, recipe: Recipe, reader: Any) -> dict[str, Any]:
        """Return the name of the one output."""
        return {"labels": [REWARD_LABEL]}


CLASSIFICATION = LabeledText(ONE_LABEL)
MULTI_LABEL = LabeledText(LABELS)
REGRESSION = LabeledText(NUMBER, ("number",))
REWARD = Reward()
