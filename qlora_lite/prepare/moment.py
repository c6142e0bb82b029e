"""A moment of a run at which a task measures its model, and what it then says."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lite.data.checks.metrics import Score
from qlora_lite.data.tokens.examples import Dataset
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.loop import Trainer
from qlora_lite.units import format_score

log = logging.getLogger("qlora_lite")
Watch = Callable[[str, int, int], None]  # is told what is being done, how many are done, and of how many
BEFORE, DURING, AFTER = "before", "during", "after"


class Measured(NamedTuple):
    """What was measured on examples.

    Args:
        scores: by name, in the order of the metrics.
        answers: in the order of the examples; "" for one left out, and CUT behind one that had to be cut. None are
            there where no metric is of answers.
        matches: whether each answer is its own reference, in their order; None where a checkpoint of an earlier version
            did not say.
        records: of each compared example, see ``_record``, with answer_loss and, of accuracy, the likeliest choice.
        prompts: how many different ones the compared examples have.
    """

    scores: dict[str, Score]
    answers: tuple[str, ...] = ()
    matches: tuple[bool | None, ...] = ()
    records: tuple[dict, ...] = ()
    prompts: int = 0

    @property
    def compared(self) -> str:
        """Say how many examples were compared."""
        count = f"{len(self.records):,} examples"
        return count if self.prompts == len(self.records) else f"{self.prompts:,} prompts with {count}"

    def figures(self) -> dict[str, Any]:
        """Return what JSON says: exact match under the keys that it had before there were other metrics, and all."""
        exact = self.scores.get("exact_match")
        known = {"exact_match": exact.value, "exact_match_rows": exact.examples} if exact else {}
        prompts = {"metrics_prompts": self.prompts} if self.prompts < len(self.records) else {}
        return known | {"metrics": {name: score.as_dict() for name, score in self.scores.items()}} | prompts


class LabelledRows(NamedTuple):
    """What became of a file: rows that were labelled, and how many of them were cut to ``data.max_tokens``."""

    rows: int
    cut: int


@dataclass(frozen=True)
class Moment:
    """Before training, after it, or between two steps.

    Args:
        when: BEFORE, DURING or AFTER.
        reader: of the task.
        eval_data: None without evaluation rows.
        folder: of the run.
        kept: of ``prepare.task.Encoded``.
        watch: told how far measuring is.
        at_once: returns a context in which a signal ends what is left half done by nobody.
        prompts_at_once: returns how many prompts all ranks have room for, given the tokens of the longest with its
            answer.
        summary: of the run so far.
        record: writes entries into it.
    """

    when: str
    recipe: Recipe
    trainer: Trainer
    reader: Any
    data: Dataset
    eval_data: Dataset | None
    folder: Path
    kept: Mapping[str, Any]
    watch: Watch | None
    at_once: Callable[[], AbstractContextManager[None]]
    prompts_at_once: Callable[[int], int]
    summary: Mapping[str, Any]
    record: Callable[..., None]

    def __str__(self) -> str:
        return f"after step {self.trainer.step}" if self.when == DURING else f"{self.when} training"

    def log_scores(self, result: Measured, compared: str) -> None:
        """Log what was measured.

        Args:
            compared: how many examples.
        """
        shown = {name.replace("_", " "): format_score(name, each.as_dict()) for name, each in result.scores.items()}
        log.info("metrics %s, %s: %s", self, compared, ", ".join(f"{name} {score}" for name, score in shown.items()))
