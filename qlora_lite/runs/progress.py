"""What a run remembers of its course beside the trainer's state; a checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from qlora_lite.artifacts.run_files import with_present_names
from qlora_lite.prepare.moment import Measured
from qlora_lite.train.checkpoints import Tensors
from qlora_lite.train.loop import StepMetrics


@dataclass(frozen=True)
class Totals:
    """Sums over all steps of a run."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    target_tokens: int = 0

    def plus(self, step: StepMetrics) -> Self:
        """Return the sums with one step more."""
        more = {name: value + step.line.get(name, 0) for name, value in asdict(self).items()}
        return replace(self, **more | {"steps": step.step})


@dataclass(frozen=True)
class Best:
    """The weights with the lowest evaluation loss so far.

    Args:
        loss: that one.
        step: after which they were evaluated.
        metrics: of the objective, of that evaluation.
        tensors: their values in host memory, of weights that ranks have divided this rank's parts.
    """

    loss: float
    step: int
    metrics: Mapping[str, float]
    tensors: Tensors


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        totals: sums over its steps.
        evaluated_step: the newest with an evaluation; measured_step: the newest with metrics of the task.
        evaluations_without_better: in a row, of those in training.
        earlier_peak_bytes: the most memory that earlier parts of the run held.
        before: what was measured before training.
        reference: means of what the reference model gives the first step's rows; None without one.
        best: None before an evaluation.
    """

    totals: Totals = Totals()
    evaluated_step: int = 0
    measured_step: int = 0
    evaluations_without_better: int = 0
    earlier_peak_bytes: int = 0
    before: Measured | None = None
    reference: list[float] | None = None
    best: Best | None = None

    def with_evaluation(self, step: int, best: Best | None) -> Self:
        """Return the progress after an evaluation in training; ``best`` is None where it was no better."""
        without = self.evaluations_without_better + 1 if best is None else 0
        return replace(self, evaluated_step=step, evaluations_without_better=without, best=best or self.best)

    def document(self, peak_bytes: int) -> dict[str, Any]:
        """Return what a checkpoint holds, but for the best weights, which are a file of their own."""
        best = self.best
        return {
            "evaluated_step": self.evaluated_step,
            "measured_step": self.measured_step,
            "totals": asdict(self.totals),
            "peak_bytes": peak_bytes,
            "evaluations_without_better": self.evaluations_without_better,
            "before": self.before and {"answers": self.before.answers, "matches": self.before.matches},
            "best_loss": None if best is None else best.loss,
            "best_step": 0 if best is None else best.step,
            "best_metrics": {} if best is None else best.metrics,
            "reference_of_step_1": self.reference,
        }

    @classmethod
    def read(cls, saved: Mapping[str, Any], best_tensors: Tensors) -> Self:
        """Return what a checkpoint holds; those of earlier versions lack parts.

        Raises:
            KeyError, TypeError, ValueError, OverflowError, AttributeError: it is not what ``document`` gives.
        """
        totals, before, best = with_present_names(saved["totals"]), saved["before"], None
        if saved["best_loss"] is not None:
            metrics = dict(saved.get("best_metrics", {}))
            best = Best(float(saved["best_loss"]), int(saved["best_step"]), metrics, best_tensors)
        return cls(
            totals=Totals(**{name: type(zero)(totals[name]) for name, zero in asdict(Totals()).items()}),
            evaluated_step=int(saved["evaluated_step"]),
            measured_step=int(saved.get("measured_step", 0)),
            evaluations_without_better=int(saved["evaluations_without_better"]),
            earlier_peak_bytes=int(saved["peak_bytes"]),
            before=None if before is None else _read_measured(before),
            reference=saved.get("reference_of_step_1"),
            best=best,
        )


def _read_measured(before: Mapping[str, Any]) -> Measured:
    answers = tuple(map(str, before["answers"]))
    return Measured({}, answers, tuple(before.get("matches", [None] * len(answers))))  # its scores are in the summary


def are_alike(before: list[float] | None, now: list[float] | None) -> bool:
    """Return whether what the reference model gives is what it gave, but for a GPU's rounding."""
    if before is None or now is None:
        return before is now
    return all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(before, now, strict=True))
