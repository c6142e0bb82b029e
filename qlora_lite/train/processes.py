"""Several processes that train one model together, each on its share of a step's micro-batches (data parallel).

Each holds the model, whole or its part of it, and all rows, and goes through the same steps; what differs between them
is which micro-batches they compute. A step's gradients are added up once, in float32, after the last micro-batch; all
that is decided from them (clipping, steps that are not finite, an update) is then decided alike everywhere, so that
weights and optimizer states stay equal without being sent. What only one rank can know (its memory ran out, it got a
signal) is agreed on in a few numbers that all exchange, in the same places of a step.

torch's DistributedDataParallel would send gradients while others are still computed, and weight each rank's mean alike;
here a step has one exchange, because adapters are small, and every target counts the same wherever it is.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qlora_lite.errors import LaunchError

from .shares import own_part

BUCKET_NUMBERS = 2**23  # of gradients that are added up at a time; 32 MiB in float32
ANSWER_SECONDS = 45.0  # of a rank that is waited for in a step,
ANSWER_TIMES = 5  # or so many times as long as this one has ever taken
FIRST_ANSWER = timedelta(minutes=10)  # before that is known
VERDICT_SECONDS = 10.0  # that each next rank waits longer than the one before it, whose word and end it may be told
ROUNDING_SECONDS = 0.1  # by which torch's clock may end a wait before Python's
BLOCK_ANSWER = timedelta(seconds=60)  # of ranks in the middle of a step, until all have come to the same block
LONGEST_ANSWER = timedelta(hours=2)  # of one that reads rows, plans, quantises a model or saves one for all
STOPPED = "stopped by"
HOW_TO_GO_ON = "`qlora-lite train RECIPE --resume` resumes the newest checkpoint"
T = TypeVar("T")
_MEASURED_BYTES, _MEASUREMENTS = 64 * 2**20, 3  # of a link
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class RankLostError(LaunchError):
    """Another rank has ended, or does not answer: what it says itself is the reason.

    ``stop``: what has noted whether this process got a signal too, from a launcher that says it (``runs.signals``).
    """

    stop: Any = None


class FirstRankLostError(RankLostError):
    """The first rank does not answer, so that another one has to say it."""


class OtherRankError(RuntimeError):
    """Memory ran out on another rank, so that all do the step again."""


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

    def share(self, parts: Sequence[T], weights: Sequence[int] = ()) -> Sequence[T]:
        """Return this rank's part of what all compute, in order: perhaps none where there are few.

        Args:
            weights: of the ranks' parts; none where all are equal.
        """
        return own_part(parts, weights or [1] * self.world_size, self.rank)

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

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the sum over all ranks, added in float32, in the place of each tensor."""

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Put the sum over all ranks in the place of each gradient; one that no rank has stays None."""

    def tell(self, text: str) -> str:
        """Return the first rank's text."""
        return text

    def require_equal(self, what: str, text: str) -> None:
        """Check that all ranks have the first one's text.

        Raises:
            LaunchError: naming the ranks that have another.
        """
        others = [rank for rank, differs in enumerate(self.gather(self.tell(text) != text)) if differs]
        if others:
            raise LaunchError(f"{name_ranks(others)} {'has' if len(others) == 1 else 'have'} other {what} than rank 0: "
                              "start all ranks with the same files, recipe and versions")  # fmt: skip

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
    def shards(self) -> "Shards":
        """The ranks among which blocks' weights can be divided."""
        return Shards(0, 1)


ALONE = Processes()


class Shards:
    """Ranks that each hold a part of what all need: those of this machine, or where it has one alone, of all machines.

    Args:
        rank: of this one among them.
        count: how many they are.
        group: theirs; None of all processes.
    """

    def __init__(self, rank: int, count: int, group: dist.ProcessGroup | None = None):
        self.rank, self.count, self._group = rank, count, group

    def gather(self, whole: torch.Tensor, sizes: Sequence[int], own: torch.Tensor) -> None:
        """Fill a buffer with the parts of all ranks in order; see ``ops.stream.Ranks``.

        Gloo gathers no parts of different sizes, and NCCL does it as here: each rank's goes to all others.
        """
        with explaining_loss():
            if len({*sizes}) == 1:
                _all_gather(whole, own, group=self._group)
                return
            parts = whole.split(sizes)
            if parts[self.rank].data_ptr() != own.data_ptr():
                parts[self.rank].copy_(own)
            works = [
                dist.broadcast(part, dist.get_global_rank(self._group or dist.group.WORLD, rank), self._group, True)
                for rank, part in enumerate(parts)
            ]
            for work in works:
                work.wait()

    def bytes_per_second(self, device: torch.device) -> float | None:
        """Measure what a rank gets from the others; None where there are none."""
        if self.count == 1:
            return None
        own = torch.zeros(_MEASURED_BYTES // self.count, dtype=torch.uint8, device=device)
        whole = torch.empty(len(own) * self.count, dtype=torch.uint8, device=device)
        seconds = []
        for _ in range(_MEASUREMENTS):
            started = time.perf_counter()
            self.gather(whole, [len(own)] * self.count, own)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return (len(whole) - len(own)) / min(seconds)


class ProcessGroup(Processes):
    """The ranks of torch's default process group.

    Args:
        rank: see ``Processes``, as are the next two.
        store: keeps what is to be remembered; None keeps nothing.
        meeting: keeps what only these processes leave for each other; None keeps nothing.
    """

    def __init__(
        self, rank: int, world_size: int, local_world_size: int = 1, store: dist.Store | None = None,
        meeting: dist.Store | None = None,
    ):  # fmt: skip
        super().__init__(rank, world_size, local_world_size)
        self._store, self._meeting = store, meeting
        self._patient = dist.new_group(timeout=LONGEST_ANSWER, backend="gloo")
        if 1 < local_world_size < world_size and world_size % local_world_size == 0:
            group, _ = dist.new_subgroups(local_world_size, timeout=BLOCK_ANSWER)
            self._shards = Shards(rank % local_world_size, local_world_size, group)
        else:
            self._shards = Shards(rank, world_size, dist.new_group(timeout=BLOCK_ANSWER))
        self._exchanged, self._longest_seconds = math.nan, math.nan  # when last; between two of them
        self._answer_seconds = FIRST_ANSWER.total_seconds()  # of the present step

    @property
    def shards(self) -> Shards:
        """See ``Processes``."""
        return self._shards

    def exchange(self, *numbers: float, failed: bool = False) -> list[float]:
        """See ``Processes``; a rank that hangs is named."""
        vector = torch.zeros(4, dtype=torch.float64)
        vector[: len(numbers) + 1] = torch.tensor([float(failed), *numbers], dtype=torch.float64)
        passed = time.monotonic() - self._exchanged
        self._longest_seconds = passed if math.isnan(self._longest_seconds) else max(passed, self._longest_seconds)
        known = not math.isnan(self._longest_seconds)
        if known:
            self._answer_seconds = max(ANSWER_SECONDS, ANSWER_TIMES * self._longest_seconds)
        with self._waiting():
            self._meet()
            self._sum(vector)
        self._exchanged = time.monotonic()
        someone_failed, *sums = vector.tolist()
        if someone_failed and not failed:
            raise OtherRankError
        return sums[: len(numbers)]

    @property
    def _patience_seconds(self) -> float:
        """How long this rank waits for another in a step: first ranks less, so that one of them says which it was."""
        return self._answer_seconds + VERDICT_SECONDS * min(self.rank, 3)

    def _sum(self, tensor: torch.Tensor) -> None:
        """Put the sum over all ranks in the place of a tensor.

        Between GPUs, it is NCCL that ends a wait without an answer: the host is not to wait for a GPU here.

        Raises:
            RankLostError: a rank has not come.
        """
        if tensor.device.type != "cpu":
            dist.all_reduce(tensor)
        elif not _ends(dist.all_reduce(tensor, async_op=True), time.monotonic() + self._patience_seconds):
            silent = f"rank {1 - self.rank}" if self.world_size == 2 else "another rank"
            error = RankLostError if self.is_first else FirstRankLostError  # who has the first rank's word ends before
            raise error(_silent(silent, self._patience_seconds))

    def _meet(self) -> None:
        """Return when all ranks have come here; a rank that does not in time is named.

        torch's ``monitored_barrier`` is the known other way: there only the first rank's wait ends in time, so that
        all wait for a first rank that hangs itself.

        Raises:
            FirstRankLostError: the first rank has not come.
            RankLostError: another one has not.
        """
        token = torch.zeros(1)
        if self.is_first:
            others = range(1, self.world_size)
            until = time.monotonic() + self._patience_seconds
            for begin in (dist.irecv, dist.isend):
                works = [begin(token, rank, self._patient) for rank in others]
                missing = [str(rank) for rank, work in zip(others, works, strict=True) if not _ends(work, until)]
                if missing:
                    raise RankLostError(_silent(f"rank {' and '.join(missing)}", self._patience_seconds))
            return
        going = dist.isend(token, 0, self._patient)  # to wait for it is to wait for the first rank
        if not _ends(dist.irecv(torch.empty(1), 0, self._patient), time.monotonic() + self._patience_seconds):
            raise FirstRankLostError(_silent("rank 0", self._patience_seconds))
        going.wait()

    def gather(self, number: float) -> list[float]:
        """See ``Processes``."""
        numbers = torch.zeros(self.world_size, dtype=torch.float64)
        numbers[self.rank] = number
        with explaining_loss():
            dist.all_reduce(numbers, group=self._patient)
        return numbers.tolist()

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """See ``Processes``."""
        for some in _buckets(tensors):
            sizes = [piece.numel() for piece in some]
            added = torch.empty(sum(sizes), dtype=torch.float32, device=some[0].device)
            for piece, place in zip(some, added.split(sizes), strict=True):
                place.copy_(piece)
            with self._waiting():
                self._sum(added)
            for piece, place in zip(some, added.split(sizes), strict=True):
                piece.copy_(place)

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See ``Processes``."""
        reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        with self._waiting():
            self._sum(reached)
        for parameter, by in zip(parameters, reached.tolist(), strict=True):
            if by:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        self.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])

    def tell(self, text: str) -> str:
        """See ``Processes``."""
        told = torch.tensor([*text.encode()], dtype=torch.uint8)
        length = torch.tensor(len(told))
        with explaining_loss():
            dist.broadcast(length, 0, self._patient)
            if not self.is_first:
                told = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(told, 0, self._patient)
        return bytes(told.tolist()).decode()

    def wait(self, long: bool = False) -> None:
        """See ``Processes``."""
        if not long:
            self.exchange()
            return
        with explaining_loss():
            dist.barrier(self._patient)
        if not math.isnan(self._exchanged):  # no step takes as long
            self._exchanged = time.monotonic()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        with explaining_loss():
            yield
        self.waited_seconds += time.monotonic() - began

    def announce_stop(self, reason: str) -> None:
        """See ``Processes``."""
        if self._meeting is not None:
            with suppress(RuntimeError):  # the store ends with rank 0 where no agent keeps it
                self._meeting.set(STOPPED, reason)

    def stop_announced(self) -> str | None:
        """See ``Processes``."""
        with suppress(RuntimeError):
            if self._meeting is not None and self._meeting.check([STOPPED]):
                return self._meeting.get(STOPPED).decode()
        return None

    def remember(self, key: str, value: str) -> None:
        """See ``Processes``."""
        if self._store is not None:
            with explaining_loss():
                self._store.set(key, value)

    def recall(self, key: str) -> str | None:
        """See ``Processes``."""
        if self._store is None:
            return None
        with explaining_loss():
            return self._store.get(key).decode() if self._store.check([key]) else None

    def seed(self, seed: int, step: int, device: torch.device) -> None:
        """See ``Processes``."""
        number = random.Random(f"{seed} {step} {self.rank}").getrandbits(63)
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(number)


def name_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 1", or "ranks 1, 2 and 3"."""
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield contiguous tensors of one device in order, as flat pieces, as many as have ``BUCKET_NUMBERS`` at a time."""
    some: list[torch.Tensor] = []
    room = BUCKET_NUMBERS
    for piece in (piece for tensor in tensors for piece in tensor.view(-1).split(BUCKET_NUMBERS)):
        if piece.numel() > room:
            yield some
            some, room = [], BUCKET_NUMBERS
        some.append(piece)
        room -= piece.numel()
    if some:
        yield some


@contextmanager
def explaining_loss() -> Iterator[None]:
    """Turn the error of an exchange in which a rank is missing into one that says so.

    Raises:
        RankLostError: another rank has ended, or does not answer.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's; dist.DistError is one of its subclasses
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise RankLostError(
            f"another process of this run has ended or does not answer ({first[:200]}); its own message says why. "
            f"{HOW_TO_GO_ON}"
        ) from None


def _ends(work: dist.Work, until: float) -> bool:
    """Return whether an exchange ends in time, on the clock of ``time.monotonic``.

    Raises:
        RuntimeError: it cannot end, because the other rank has.
    """
    try:
        work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))
    except RuntimeError:
        if time.monotonic() < until - ROUNDING_SECONDS:
            raise
        return False
    return True


def _silent(who: str, seconds: float) -> str:
    return f"{who} has not answered for {seconds:.0f} s, so that all end; {HOW_TO_GO_ON}"
