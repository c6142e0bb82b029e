"""The processes of a run as torch's default process group joins them: each exchange, and how long it is waited for.

A rank that hangs is as bad as one that has ended, and torch's own time limits are of whole groups: long enough for what
a run does once, they would be far too long for a step. So exchanges in a step begin with a meeting whose patience
follows the time that steps take, and a rank that does not come is named. Sums are float32, in buckets.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from qlora_lite.errors import first_line

from .processes import FirstRankLostError, OtherRankError, Processes, RankLostError, Shards

BUCKET_NUMBERS = 2**23  # of gradients that are added up at a time; 32 MiB in float32
ANSWER_SECONDS = 40.0  # of a rank that is waited for in a step,
ANSWER_TIMES = 5  # or so many times as long as this one has ever taken
FIRST_ANSWER = timedelta(minutes=10)  # before that is known
VERDICT_SECONDS = 10.0  # that each next rank waits longer than the one before it, whose word and end it may be told
ROUNDING_SECONDS = 0.1  # by which torch's clock may end a wait before Python's
BLOCK_ANSWER = timedelta(seconds=60)  # of ranks in the middle of a step, until all have come to the same block
LONGEST_ANSWER = timedelta(hours=2)  # of one that reads rows, plans, quantises a model or saves one for all
STOPPED = "stopped by"
HOW_TO_GO_ON = "`qlora-lite train RECIPE --resume` resumes the newest checkpoint"
_MEASURED_BYTES, _MEASUREMENTS = 64 * 2**20, 3  # of a link
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class GroupShards(Shards):
    """Ranks that each hold a part of what all need: those of this machine, or where it has one alone, of all machines.

    Args:
        rank: see ``Shards``, as is the next.
        group: theirs.
    """

    def __init__(self, rank: int, count: int, group: dist.ProcessGroup):
        super().__init__(rank, count)
        self._group = group

    def gather(self, whole: torch.Tensor, sizes: Sequence[int], own: torch.Tensor) -> None:
        """See ``Shards``.

        Gloo gathers no parts of different sizes, and NCCL does it as here: each rank's goes to all others.
        """
        with _explaining_loss():
            if len({*sizes}) == 1:
                _all_gather(whole, own, group=self._group)
                return
            parts = whole.split(sizes)
            if parts[self.rank].data_ptr() != own.data_ptr():
                parts[self.rank].copy_(own)
            works = [
                dist.broadcast(part, dist.get_global_rank(self._group, rank), self._group, async_op=True)
                for rank, part in enumerate(parts)
            ]
            for work in works:
                work.wait()

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See ``Shards``."""
        with _explaining_loss():
            dist.all_to_all_single(received, sent, group=self._group)

    def bytes_per_second(self, device: torch.device) -> float | None:
        """See ``Shards``."""
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
        self,
        rank: int,
        world_size: int,
        local_world_size: int = 1,
        store: dist.Store | None = None,
        meeting: dist.Store | None = None,
    ):
        super().__init__(rank, world_size, local_world_size)
        self._store, self._meeting = store, meeting
        self._patient = dist.new_group(timeout=LONGEST_ANSWER, backend="gloo")
        # NCCL counts from the host's call, which is ahead of the GPU or of a rank that compiles, and ends the process
        patience = FIRST_ANSWER if "nccl" in dist.get_backend_config() else BLOCK_ANSWER
        if 1 < local_world_size < world_size and world_size % local_world_size == 0:
            group, _ = dist.new_subgroups(local_world_size, timeout=patience)
            self._shards = GroupShards(rank % local_world_size, local_world_size, group)
            same = [[*range(first, world_size, local_world_size)] for first in range(local_world_size)]
            self._machines, _ = dist.new_subgroups_by_enumeration(same, timeout=patience)
        else:
            self._machines = None
            self._shards = GroupShards(rank, world_size, dist.new_group(timeout=patience))
        self._exchanged: float | None = None  # when last
        self._longest_seconds = 0.0  # between two of them
        self._answer_seconds = FIRST_ANSWER.total_seconds()  # of the present step

    @property
    def shards(self) -> Shards:
        """See ``Processes``."""
        return self._shards

    def exchange(self, *numbers: float, failed: bool = False) -> list[float]:
        """See ``Processes``; a rank that hangs is named."""
        vector = torch.zeros(4, dtype=torch.float64)
        vector[: len(numbers) + 1] = torch.tensor([float(failed), *numbers], dtype=torch.float64)
        if self._exchanged is not None:
            self._longest_seconds = max(self._longest_seconds, time.monotonic() - self._exchanged)
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
            return
        seconds = self._patience_seconds
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=seconds)  # after the group's, for which this process could not end
        if not _ends(dist.group.WORLD.allreduce([tensor], options), time.monotonic() + seconds):
            silent = f"rank {1 - self.rank}" if self.world_size == 2 else "another rank"
            error = RankLostError if self.is_first else FirstRankLostError  # who has the first rank's word ends before
            raise error(_silent(silent, seconds))

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
        with _explaining_loss():
            dist.all_reduce(numbers, group=self._patient)
        return numbers.tolist()

    def connect(self, device: torch.device, trains_parts: bool) -> None:
        """See ``Processes``."""
        count = self._shards.count
        sizes = [2, *[1] * (count - 1)]
        whole, rows = torch.zeros(sum(sizes), device=device), torch.zeros(count, 1, device=device)
        self._shards.gather(whole, sizes, whole.split(sizes)[self._shards.rank])
        if trains_parts:
            self._shards.exchange(torch.empty_like(rows), rows)
            if self._machines is not None:
                dist.all_reduce(rows, group=self._machines)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """See ``Processes``."""
        self._add_up(tensors, self._sum)

    def add_up_parts(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See ``Processes``."""
        if self._machines is not None:
            self._add_up([p.grad for p in parameters], partial(dist.all_reduce, group=self._machines))

    def _add_up(self, tensors: Sequence[torch.Tensor], sum_: Callable[[torch.Tensor], object]) -> None:
        for some in _buckets(tensors):
            sizes = [piece.numel() for piece in some]
            added = torch.empty(sum(sizes), dtype=torch.float32, device=some[0].device)
            for piece, place in zip(some, added.split(sizes), strict=True):
                place.copy_(piece)
            with self._waiting():
                sum_(added)
            for piece, place in zip(some, added.split(sizes), strict=True):
                piece.copy_(place)

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See ``Processes``."""
        for parameter in parameters:
            parameter.grad = parameter.grad.contiguous()
        self.add_up([parameter.grad for parameter in parameters])

    def tell(self, text: str, source: int = 0) -> str:
        """See ``Processes``."""
        told = torch.tensor([*text.encode()], dtype=torch.uint8)
        length = torch.tensor(len(told))
        with _explaining_loss():
            dist.broadcast(length, source, self._patient)
            if self.rank != source:
                told = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(told, source, self._patient)
        return bytes(told.tolist()).decode()

    def hand_in(self, tensor: torch.Tensor) -> None:
        """See ``Processes``."""
        with _explaining_loss():
            dist.send(tensor, 0, self._patient)

    def collect(self, tensor: torch.Tensor, source: int) -> None:
        """See ``Processes``."""
        with _explaining_loss():
            dist.recv(tensor, source, self._patient)

    def wait(self, long: bool = False) -> None:
        """See ``Processes``."""
        if not long:
            self.exchange()
            return
        with _explaining_loss():
            dist.barrier(self._patient)
        if self._exchanged is not None:  # no step takes as long
            self._exchanged = time.monotonic()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        with _explaining_loss():
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
            with _explaining_loss():
                self._store.set(key, value)

    def recall(self, key: str) -> str | None:
        """See ``Processes``."""
        if self._store is None:
            return None
        with _explaining_loss():
            return self._store.get(key).decode() if self._store.check([key]) else None

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
def _explaining_loss() -> Iterator[None]:
    """Turn the error of an exchange in which a rank is missing into one that says so.

    Raises:
        RankLostError: another rank has ended, or does not answer.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's; dist.DistError is one of its subclasses
        raise RankLostError(
            f"another process of this run has ended or does not answer ({first_line(error)}); its own message says "
            f"why. {HOW_TO_GO_ON}"
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
