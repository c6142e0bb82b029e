"""Which rows stand in which micro-batch of which step: a pure function of the rows' lengths and the settings."""

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from heapq import nlargest
from math import ceil

import numpy as np

from qlora_lite.data.tokens.batch import Extent, extent_of, plan_epoch
from qlora_lite.errors import TrainingError

from .settings import TrainSettings
from .shares import own_micro_batches

LOOKED_AT = 1_000_000  # rows of a run, once for each epoch, whose micro-batches are looked at


class Epochs:
    """The order of a run's rows.

    Args:
        lengths: tokens of each row.
        learned: target tokens of each row.
        settings: see ``TrainSettings``.
        rank: whose micro-batches they are, where ranks have shares of their own.
        pictures: of each row, see ``Workload.picture_counts``; None where rows have none.

    Raises:
        TrainingError: there are no rows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        targets: Sequence[int],
        settings: TrainSettings,
        rank: int = 0,
        pictures: np.ndarray | None = None,
    ):
        if not len(lengths):
            raise TrainingError("there are no rows to train on")
        self.lengths, self.targets, self.settings, self.rank = lengths, targets, settings, rank
        self.pictures = pictures

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each step of an epoch."""
        s = self.settings
        group = s.gradient_accumulation_steps
        plan = plan_epoch(self.lengths, s.max_tokens, s.packing, s.micro_batch_size, s.order, s.seed, epoch, group)
        return [plan[start : start + group] for start in range(0, len(plan), group)]

    def rows_of(self, steps: int) -> np.ndarray:
        """Return the rows of the first steps of the run, rising: int64 [N]."""
        first = self.steps(0)
        if steps >= len(first):
            return np.arange(len(self.lengths))
        return np.unique([row for step in first[:steps] for rows in step for row in rows])

    def total_steps(self) -> int:
        """Return how many optimizer steps the run has, at least 1."""
        return self.settings.max_steps or self._course[0]

    def largest(self) -> tuple[list[int], Extent]:
        """Return the rows of the micro-batch with the most tokens of all that the run will see, and the most that any
        has of each thing that takes memory."""
        return self._course[1:]

    @cached_property
    def _course(self) -> tuple[int, list[int], Extent]:
        """How many steps the run has, and its largest micro-batch: in one pass, which takes seconds for hundreds of
        thousands of rows. After ``LOOKED_AT`` rows the micro-batches still to come are taken to be as full as can be.
        """
        s, done = self.settings, 0
        largest: list[int] = []
        extents: list[Extent] = []
        epochs = Fraction(s.epochs).limit_denominator(1_000_000)
        epoch = 0
        while True:
            steps = self.steps(epoch)
            if s.max_steps:
                steps = steps[: s.max_steps - done]
            elif epochs - epoch < 1:
                steps = steps[: max(ceil((epochs - epoch) * len(steps)), 0 if done else 1)]
            micro_batches = [list(rows) for step in steps for rows in self._computed(step)]
            if micro_batches:
                largest = max([largest, *micro_batches], key=self._tokens)
                extents.append(extent_of(self.lengths, self.targets, micro_batches, self.pictures))
            done += len(steps)
            if done == s.max_steps or (not s.max_steps and epoch + 1 >= epochs):
                return done, largest, _most(extents)
            if s.max_steps and (epoch + 1) * len(self.lengths) >= LOOKED_AT:
                return s.max_steps, largest, self._as_full_as_can_be(_most(extents))
            epoch += 1

    def _as_full_as_can_be(self, seen: Extent) -> Extent:
        s, longest = self.settings, max(self.lengths)
        packs = s.micro_batch_size * (s.shares[self.rank].joined if s.shares else 1)
        tokens = packs * s.max_tokens if s.packing else sum(nlargest(packs, self.lengths))
        tokens = min(tokens, sum(self.lengths))
        targets = min(seen.targets + tokens - seen.tokens, sum(self.targets))
        there = 0 if self.pictures is None else int(self.pictures[:, 0].sum())
        pictures = min(seen.pictures + tokens - seen.tokens, there)
        return Extent(tokens, max(seen.rows, -(-tokens // longest)), longest, targets, pictures, seen.largest_picture)

    def _computed(self, step: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return the rows of each micro-batch of a step, as far as this rank may compute them."""
        shares = self.settings.shares
        return (own_micro_batches(step, shares, self.rank) or step[:1]) if shares else step

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)


def _most(extents: Sequence[Extent]) -> Extent:
    return Extent(*map(max, zip(*extents, strict=True)))
