"""Several processes that train one model together, each on its share of a step's micro-batches (data parallel).

Each holds the whole model and all rows, and goes through the same steps; what differs between them is which
micro-batches they compute. A step's gradients are added up once, in float32, after the last micro-batch; all that is
decided from them (clipping, steps that are not finite, an update) is then decided alike everywhere, so that weights and
optimizer states stay equal without being sent. What only one rank can know (its memory ran out, it got a signal) is
agreed on in a few numbers that all exchange, in the same places of a step.

torch's DistributedDataParallel would send gradients while others are still computed, and weight each rank's mean alike;
here a step has one exchange, because adapters are small, and every target counts the same wherever it is.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qlora_lite.errors import LaunchError

BUCKET_NUMBERS = 2**23  # of gradients that are added up at a time; 32 MiB in float32
ANSWER_SECONDS = 45.0  # of a rank that is waited for in a step; or five times as long as this one has ever taken
FIRST_ANSWER = timedelta(minutes=10)  # before that is known
VERDICT_SECONDS = 10.0  # that each next rank waits longer than the one before it, whose word and end it may be told
ROUNDING_SECONDS = 0.1  # by which torch's clock may end a wait before Python's
LONGEST_ANSWER = timedelta(hours=2)  # of one that reads rows, plans, quantises a model or saves one for all
HOW_TO_GO_ON = "`qlora-lite train RECIPE --resume` resumes the newest checkpoint"
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


class Processes:
    """The processes that train together; this class is for one that trains alone, and exchanges nothing.

    Args:
        rank: of this process; rank 0 writes the run's files.
        world_size: how many there are.
        local_world_size: how many of them share this machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_world_size: int = 1):
        self.rank, self.world_size, self.local_world_size = rank, world_size, local_world_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have found."""
        return self.rank == 0

    def share(self, parts: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of what all compute, in order: none where there are fewer than ranks."""
        first, last = (number * len(parts) // self.world_size for number in (self.rank, self.rank + 1))
        return parts[first:last]

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
            raise LaunchError(f"rank {' and '.join(map(str, others))} has other {what} than rank 0: start all ranks "
                              "with the same files, recipe and versions")  # fmt: skip

    @contextmanager
    def one_ahead(self) -> Iterator[None]:
        """Let the first rank go through first: what it leaves in a cache, the others find there."""
        if not self.is_first:
            self.wait(long=True)
        yield
        if self.is_first:
            self.wait(long=True)
        self.wait(long=True)  # for the others

    def wait(self, long: bool = False) -> None:
        """Return when all ranks have come here, which may take ``long``."""

    def seed(self, seed: int, step: int, device: torch.device) -> None:
        """Begin the random numbers of a step anew, so that no rank draws another's and a resumed run needs no state.

        One process draws on from where it is.
        """


ALONE = Processes()


class ProcessGroup(Processes):
    """The ranks of torch's default process group."""

    def __init__(self, rank: int, world_size: int, local_world_size: int = 1):
        super().__init__(rank, world_size, local_world_size)
        self._patient = dist.new_group(timeout=LONGEST_ANSWER, backend="gloo")
        self._exchanged, self._longest_seconds = math.nan, math.nan  # when last; between two of them
        self._answer_seconds = FIRST_ANSWER.total_seconds()  # of the present step

    def exchange(self, *numbers: float, failed: bool = False) -> list[float]:
        """See ``Processes``; a rank that hangs is named."""
        vector = torch.zeros(4, dtype=torch.float64)
        vector[: len(numbers) + 1] = torch.tensor([float(failed), *numbers], dtype=torch.float64)
        passed = time.monotonic() - self._exchanged
        self._longest_seconds = passed if math.isnan(self._longest_seconds) else max(passed, self._longest_seconds)
        known = not math.isnan(self._longest_seconds)
        if known:
            self._answer_seconds = max(ANSWER_SECONDS, 5 * self._longest_seconds)
        with explaining_loss():
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
            with explaining_loss():
                self._sum(added)
            for piece, place in zip(some, added.split(sizes), strict=True):
                piece.copy_(place)

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See ``Processes``."""
        reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        with explaining_loss():
            self._sum(reached)
        for parameter, by in zip(parameters, reached.tolist(), strict=True):
            if by:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        self.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])

    def tell(self, text: str) -> str:
        """See ``Processes``."""
        return bytes(self._of_first(text).tolist()).decode()

    def _of_first(self, text: str) -> torch.Tensor:
        told = torch.tensor([*text.encode()], dtype=torch.uint8)
        length = torch.tensor(len(told))
        with explaining_loss():
            dist.broadcast(length, 0, self._patient)
            if not self.is_first:
                told = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(told, 0, self._patient)
        return told

    def wait(self, long: bool = False) -> None:
        """See ``Processes``."""
        if not long:
            self.exchange()
            return
        with explaining_loss():
            dist.barrier(self._patient)

    def seed(self, seed: int, step: int, device: torch.device) -> None:
        """See ``Processes``."""
        number = random.Random(f"{seed} {step} {self.rank}").getrandbits(63)
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(number)


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


@contextmanager
def joined(rank: int, world_size: int, local_rank: int, local_world_size: int, device: str) -> Iterator[Processes]:
    """Join the other processes, each of a machine with a GPU of its own if any is used.

    Args:
        device: auto, cpu or cuda.

    Raises:
        LaunchError: there are more than GPUs, or they do not find each other.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_world_size > torch.cuda.device_count():
            raise LaunchError(f"{local_world_size} processes were started on a machine with "
                              f"{torch.cuda.device_count()} GPUs: start one for each")  # fmt: skip
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=FIRST_ANSWER, rank=rank, world_size=world_size)
        if on_gpu:  # its buffers are there before anybody asks how much memory is free
            dist.all_reduce(torch.zeros(1, device="cuda"))
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise LaunchError(f"rank {rank} does not find the other processes ({first[:200]})") from None
    yield ProcessGroup(rank, world_size, local_world_size)
    dist.destroy_process_group()  # after an error the others may wait for this one, and its end is their answer
