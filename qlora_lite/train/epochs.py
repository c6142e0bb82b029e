"""Which rows stand in which micro-batch of which step: a pure function of the rows' lengths and the settings."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import count
from math import ceil

from qlora_lite.data.batch import plan_epoch

from .settings import TrainSettings


class Epochs:
    """The order of a run's rows.

    Args:
        lengths: tokens of each row.
        settings: see ``TrainSettings``.
    """

    def __init__(self, lengths: Sequence[int], settings: TrainSettings):
        self.lengths, self.settings = lengths, settings

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each step of an epoch."""
        s = self.settings
        group = s.gradient_accumulation_steps
        plan = plan_epoch(self.lengths, s.max_tokens, s.packing, s.micro_batch_size, s.order, s.seed, epoch, group)
        return [plan[start : start + group] for start in range(0, len(plan), group)]

    def total_steps(self) -> int:
        """Return how many optimizer steps the run has, at least 1."""
        if self.settings.max_steps:
            return self.settings.max_steps
        whole, part = divmod(Fraction(self.settings.epochs).limit_denominator(1_000_000), 1)
        steps = sum(len(self.steps(epoch)) for epoch in range(whole))
        return max(1, steps + (ceil(part * len(self.steps(whole))) if part else 0))

    def largest(self) -> list[int]:
        """Return the rows of the micro-batch with the most tokens of all that the run will see."""
        largest: list[int] = []
        left = self.total_steps()
        for epoch in count():
            steps = self.steps(epoch)[:left]
            largest = max([largest, *(rows for step in steps for rows in step)], key=self._tokens)
            left -= len(steps)
            if left <= 0:
                return largest

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)
