"""Measure a run's model on its evaluation rows: the loss, and what the task says of it."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from qlora_lite.inference.evaluate import answered_at_once, watching
from qlora_lite.prepare.moment import AFTER, BEFORE, DURING, Measured, Moment
from qlora_lite.prepare.task import find_task
from qlora_lite.train.step import Evaluation

from .progress import Best
from .stages import Proven

log = logging.getLogger("qlora_lite")


class Measuring:
    """Measures at moments of a run.

    Args:
        proven: the run.
        note: takes the figures of a step.
        watch: told how far measuring is.

    ``eval_data`` are the run's evaluation rows, None without any.
    """

    def __init__(self, proven: Proven, note: Callable[[dict], None], watch: Callable[[str, int, int], None]):
        self.proven, self.trainer, self.note, self.watch = proven, proven.trainer, note, watch
        self.task, self.eval_data = find_task(proven.recipe), proven.data.eval_data

    def at_once(self) -> AbstractContextManager[None]:
        """Let a signal end what is left half done by nobody; of several ranks, at the next place where all agree."""
        return self.proven.stop.at_once() if self.proven.processes.world_size == 1 else nullcontext()

    def evaluate(self) -> Evaluation | None:
        """Return the loss on the evaluation rows, and log it; None without any."""
        if self.eval_data is None:
            return None
        examples, step = self.eval_data.examples, self.trainer.step
        with self.at_once():
            found = self.trainer.evaluate(examples, watching(self.watch, "evaluation", len(examples)))
        is_likelihood = self.trainer.workload.objective.is_likelihood
        self.note(
            {
                "step": step,
                "eval_loss": found.loss,
                **({"eval_perplexity": found.perplexity} if is_likelihood else {}),
                "eval_target_tokens": found.target_tokens,
                **{f"eval_{name}": value for name, value in found.metrics.items()},
            }
        )
        log.info("step %d: evaluation loss %.4f", step, found.loss)
        return found

    def in_training(self) -> None:
        """Note the task's metrics between two steps."""
        if result := self.task.metrics(self._moment(DURING)):
            self.note({"step": self.trainer.step, **{name: score.value for name, score in result.scores.items()}})

    def before(self) -> Measured | None:
        """Measure what training begins with."""
        return self._measure(BEFORE, self.evaluate())

    def after(self, best: Best | None) -> Measured | None:
        """Measure what training ends with; ``best`` is what the model has by now, None if it was not evaluated."""
        return self._measure(AFTER, best or self.evaluate())

    def _measure(self, when: str, evaluation: Evaluation | Best | None) -> Measured | None:
        run, moment, result = self.proven.run, self._moment(when), None
        if evaluation is not None:
            run.update(**{f"eval_loss_{when}": evaluation.loss})
            if evaluation.metrics:
                run.update(eval_metrics=run.summary.get("eval_metrics", {}) | {when: dict(evaluation.metrics)})
            result = self.task.metrics(moment)
        result = self.task.illustrate(moment, result)
        if result:
            found = result.figures()
            if "exact_match" in found:
                exact = {f"exact_match_{when}": found["exact_match"], "exact_match_rows": found["exact_match_rows"]}
                run.update(**exact)
            run.update(metrics=run.summary.get("metrics", {}) | {when: found["metrics"]})
        return result

    def _moment(self, when: str) -> Moment:
        proven = self.proven
        return Moment(
            when=when,
            recipe=proven.recipe,
            trainer=self.trainer,
            reader=proven.tokenizer,
            data=proven.data.data,
            eval_data=self.eval_data,
            folder=proven.run.path,
            kept=proven.kept,
            watch=self.watch,
            at_once=self.at_once,
            prompts_at_once=self._prompts_at_once,
            summary=proven.run.summary,
            record=proven.run.update,
        )

    def _prompts_at_once(self, tokens: int) -> int:
        """Return how many prompts all ranks have room for, given the tokens of the longest with its answer."""
        proven = self.proven
        own = answered_at_once(proven.recipe, proven.model, proven.budget_bytes, tokens)
        return int(min(proven.processes.gather(own)))
