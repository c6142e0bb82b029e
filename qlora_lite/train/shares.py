"""Which of a step's micro-batches each of several ranks computes, where their GPUs are not equally fast.

A step ends when its slowest rank does. So each gets as many sequences as its speed says, not as many as every other.
Ranks that each have the whole model run any number of micro-batches. Those that divide it put every layer together at
one time, so that all run the same number; there, a faster rank has more sequences in each of its own: micro-batches
are joined. What is learned stays the same to within the order of sums, since a loss is divided by the weight of the
whole step.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Share(NamedTuple):
    """One rank's part of a step: how many of its micro-batches, and how many of those it joins to one."""

    micro_batches: int
    joined: int = 1

    @property
    def runs(self) -> int:
        """How many micro-batches the rank computes."""
        return -(-self.micro_batches // self.joined)


def deal(count: int, speeds: Sequence[float]) -> list[int]:
    """Return how many of equal pieces of work each rank gets, so that the last one ends as early as can be.

    Each has one at least; of ranks that would end at the same time, the first gets the next piece.

    Args:
        count: of the pieces, as many as ranks or more.
        speeds: in pieces per second, or anything in proportion.
    """
    given = [1] * len(speeds)
    for _ in range(count - len(speeds)):
        ends = [(number + 1) / speed for number, speed in zip(given, speeds, strict=True)]
        given[ends.index(min(ends))] += 1
    return given


def own_part(parts: Sequence[T], weights: Sequence[int], rank: int) -> Sequence[T]:
    """Return a rank's part of what all compute, in order; an epoch's last step has fewer parts, divided likewise."""
    ends = [0, *accumulate(weights)]
    first, last = (end * len(parts) // ends[-1] for end in ends[rank : rank + 2])
    return parts[first:last]


def own_micro_batches(step: Sequence[Sequence[T]], shares: Sequence[Share], rank: int) -> list[Sequence[T]]:
    """Return the rows of the micro-batches that a rank computes of a step, of which all are given."""
    own, joined = own_part(step, [share.micro_batches for share in shares], rank), shares[rank].joined
    return [[row for rows in own[start : start + joined] for row in rows] for start in range(0, len(own), joined)]
