"""Which rows stand in which micro-batch of which step: a pure function of the rows' lengths and the settings."""

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import count
from math import ceil

from qlora_lite.data.batch import plan_epoch
from qlora_lite.errors import TrainingError

from .settings import TrainSettings


class Epochs:
    """The order of a run's rows.

    Args:
        lengths: tokens of each row.
        settings: see ``TrainSettings``.

    Raises:
        TrainingError: there are no rows.
    """

    def __init__(self, lengths: Sequence[int], settings: TrainSettings):
        if not len(lengths):
            raise TrainingError("there are no rows to train on")
        self.lengths, self.settings = lengths, settings

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each step of an epoch."""
        s = self.settings
        group = s.gradient_accumulation_steps
        plan = plan_epoch(self.lengths, s.max_tokens, s.packing, s.micro_batch_size, s.order, s.seed, epoch, group)
        return [plan[start : start + group] for start in range(0, len(plan), group)]

    def total_steps(self) -> int:
        """Return how many optimizer steps the run has, at least 1."""
        return self.settings.max_steps or self._course[0]

    def largest(self) -> list[int]:
        """Return the rows of the micro-batch with the most tokens of all that the run will see."""
        return self._course[1]

    @cached_property
    def _course(self) -> tuple[int, list[int]]:
        """How many steps the run has, and the rows of its largest micro-batch: in one pass, which takes seconds for
        hundreds of thousands of rows."""
        s, largest, done = self.settings, [], 0
        epochs = Fraction(s.epochs).limit_denominator(1_000_000)
        for epoch in count():
            steps = self.steps(epoch)
            if s.max_steps:
                steps = steps[: s.max_steps - done]
            elif epochs - epoch < 1:
                steps = steps[: max(ceil((epochs - epoch) * len(steps)), 0 if done else 1)]
            largest = max([largest, *(rows for step in steps for rows in step)], key=self._tokens)
            done += len(steps)
            if done == s.max_steps or (not s.max_steps and epoch + 1 >= epochs):
                return done, largest

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)
