"""Several processes that train one model together, each on its share of a step's micro-batches (data parallel).

Each holds the model, whole or its part of it, and all rows, and goes through the same steps; what differs between them
is which micro-batches they compute. A step's gradients are added up once, in float32, after the last micro-batch; all
that is decided from them (clipping, steps that are not finite, an update) is then decided alike everywhere, so that
weights and optimizer states stay equal without being sent. What only one rank can know (its memory ran out, it got a
signal) is agreed on in a few numbers that all exchange, in the same places of a step.

torch's DistributedDataParallel would send gradients while others are still computed, and weight each rank's mean alike;
here a step has one exchange, because adapters are small, and every target counts the same wherever it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from qlora_lite.errors import LaunchError

from .shares import own_part

T = TypeVar("T")


class RankLostError(LaunchError):
    """Another rank has ended, or does not answer: what it says itself is the reason.

    ``stop``: what has noted whether this process got a signal too, from a launcher that says it (``runs.signals``).
    """

    stop: Any = None


class FirstRankLostError(RankLostError):
    """The first rank does not answer, so that another one has to say it."""


class OtherRankError(RuntimeError):
    """Memory ran out on another rank, so that all do the step again."""


class Shards:
    """The ranks among which weights can be divided; this class is for one alone, which divides nothing.

    Args:
        rank: of this one among them.
        count: how many they are.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    def gather(self, whole: torch.Tensor, sizes: Sequence[int], own: torch.Tensor) -> None:
        """Fill a buffer with the parts of all ranks in order; see ``offload.stream.Ranks``."""
        whole.copy_(own)

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Give each rank its row of a buffer [ranks, bytes], and get from each the row that it has for this one."""
        received.copy_(sent)

    def bytes_per_second(self, device: torch.device) -> float | None:
        """Measure what a rank gets from the others; None where there are none."""
        return None


class Processes:
    """The processes that train together; this class is for one that trains alone, and exchanges nothing.

    Args:
        rank: of this process; rank 0 writes the run's files. Those of one machine follow one another.
        world_size: how many there are.
        local_world_size: how many of them share this machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_world_size: int = 1):
        self.rank, self.world_size, self.local_world_size = rank, world_size, local_world_size
        self.waited_seconds = 0.0  # in exchanges so far, for others and for what is sent

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have found."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this process prepares what those of its machine share.

        Of any n ranks in a row, one is divisible by n, also where machines have different numbers of them.
        """
        return self.rank % self.local_world_size == 0

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of what all compute, in order: none where there are fewer than ranks."""
        return own_part(parts, [1] * self.world_size, self.rank)

    def exchange(self, *numbers: float, failed: bool = False) -> list[float]:
        """Return the sum of up to three numbers over all ranks; every rank calls it at the same places.

        Raises:
            OtherRankError: another rank has called it after its memory ran out.
            RankLostError: another rank has ended.
        """
        return list(numbers)

    def gather(self, number: float) -> list[float]:
        """Return the numbers of all ranks, in order."""
        return [number]

    def any(self, is_so: bool) -> bool:
        """Return whether something is so on some rank."""
        return bool(self.exchange(float(is_so))[0])

    def largest(self, number: float) -> float:
        """Return the largest of the ranks' numbers."""
        return max(self.gather(number))

    def connect(self, device: torch.device, trains_parts: bool) -> None:
        """Exchange something in each way in which ranks that divide weights do: NCCL takes memory at the first of each.

        Args:
            trains_parts: whether they train them.
        """

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the sum over all ranks, added in float32, in the place of each tensor."""

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Put the sum over all ranks in the place of each gradient."""

    def add_up_parts(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Put the sum over the machines in the place of each gradient of a part of a weight, which each machine has."""

    def tell(self, text: str, source: int = 0) -> str:
        """Return the text of the first rank, or of another one."""
        return text

    def hand_in(self, tensor: torch.Tensor) -> None:
        """Send the first rank a tensor in host memory, which it is waiting for."""

    def collect(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a tensor in host memory with what a rank hands in."""

    def require_equal(self, what: str, text: str) -> None:
        """Check that all ranks have the first one's text.

        Raises:
            LaunchError: naming the ranks that have another.
        """
        others = [rank for rank, differs in enumerate(self.gather(self.tell(text) != text)) if differs]
        if others:
            raise LaunchError(
                f"{name_ranks(others)} {'has' if len(others) == 1 else 'have'} other {what} than rank 0: "
                "start all ranks with the same files, recipe and versions"
            )

    @contextmanager
    def one_ahead(self) -> Iterator[None]:
        """Let the first rank of each machine go through first: what it leaves in a cache, the others find there."""
        if not self.is_first_here:
            self.wait(long=True)
        yield
        if self.is_first_here:
            self.wait(long=True)
        self.wait(long=True)  # for the others

    def wait(self, long: bool = False) -> None:
        """Return when all ranks have come here, which may take ``long``."""

    def announce_stop(self, reason: str) -> None:
        """Leave word why this process ends at once, for those that then find it gone."""

    def stop_announced(self) -> str | None:
        """Return the word that another process has left; None if there is none."""
        return None

    def remember(self, key: str, value: str) -> None:
        """Keep a value for processes that are started in the place of these."""

    def recall(self, key: str) -> str | None:
        """Return what the processes kept in whose place these were started; None if there was nothing."""
        return None

    def seed(self, seed: int, step: int, device: torch.device) -> None:
        """Begin the random numbers of a step anew, so that no rank draws another's and a resumed run needs no state.

        One process draws on from where it is.
        """

    @property
    def shards(self) -> Shards:
        """The ranks among which blocks' weights can be divided."""
        return Shards()


ALONE = Processes()


def name_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 1", or "ranks 1, 2 and 3"."""
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
