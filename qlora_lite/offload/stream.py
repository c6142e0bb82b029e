"""Keep the weights of blocks in host memory, on a disk or on other ranks, and bring each to the device when it runs.

In host memory a block's tensors lie in one flat buffer (pinned beside a GPU), so that one copy brings them; several
blocks share an allocation, since pinned memory comes in whole powers of two. On a disk they stay in the file that they
were loaded from, which the process sees as memory (``ReadAhead``). Of several ranks each has one part of every flat
buffer on its device, and an all-gather puts a block together (``OnAllRanks``). The device has two slots: while a block
computes in one, the next in the direction of travel (the following in forward, the one before in backward) arrives in
the other. Frozen weights are never written back. 4-bit blocks are what makes this pay: one of an 8B model is 107 MiB,
and ``tools/plan_recipes --limits`` calculates from how many tokens on products hide its copy.

A block's modules hold views of its slot while it is there and otherwise what lies in host memory or in the file, so
that whatever reads the model's tensors finds the true values. Saved tensors point into a slot: they must be gone
before the slot is used again, which checkpointing per block sees to (autograd's version counters raise otherwise).

Weights that are trained stay in host memory for good, where their optimizer updates them, or each rank has a part of
them (``divided``). What a block computes with are copies in its slot; their gradients leave while the block before it
is computed (``gradients``), and are handed to the weights themselves when that has been launched: an update on the
host runs beside it.

torch's own ``fully_shard`` divides blocks among ranks too. It does so parameter by parameter and gathers them through
buffers of its own, for all blocks or for none, and to plan it takes processes. A block that lies flat needs none of
that; ``divided`` says more.

Sources: the idea of layer-to-layer execution, L2L, arXiv 2002.05645; that of dividing weights among ranks which gather
them block by block, ZeRO's third stage, arXiv 1910.02054.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import nn

from qlora_lite.memory.marks import category

from .flat_block import ALIGNMENT, FlatBlock, Place
from .gradients import Gradients, ToHost
from .offload import SideStream, host_memory, pinned_bytes

SLOTS = 2
BUFFERS = 2  # of ``ReadAhead``: one is read into while the other goes to the device
MAX_AT_ONCE_BYTES = 1 << 32  # of pinned memory; a host that has no room for more can still give less


def _home(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where a tensor lies: its storage, which others may share, and the place in it."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset() * tensor.itemsize


class Placement(Protocol):
    """Where blocks are while the device does not hold them. A further one needs these members and a place in
    ``models.memory_options.place``.

    ``buffers`` are host memory beside the blocks' own, uint8; ``shards`` what lies of the blocks on the device beside
    the slots; ``in_files`` tells whether the blocks' tensors are still where they were loaded from, ``gathers`` whether
    all ranks have to bring a block together; ``slot_bytes`` is how large a slot must be. ``gradients`` takes those of
    weights that are trained; None leaves them to ``ToHost``.
    """

    buffers: Sequence[torch.Tensor]
    shards: Sequence[torch.Tensor]
    in_files: bool
    gathers: bool
    slot_bytes: int
    gradients: Gradients | None

    def begin(self, number: int) -> None:
        """Begin to fetch a block, without waiting."""

    def bring(self, number: int, slot: torch.Tensor) -> object:
        """Copy a block to the begin of a slot on the device; return what ``SideStream.wait`` waits for."""


PlacementFactory = Callable[[Sequence[FlatBlock], SideStream], Placement]


class InHostMemory:
    """The placement of blocks in host memory, each in one flat buffer."""

    in_files, gathers = False, False
    shards: Sequence[torch.Tensor] = ()
    gradients: Gradients | None = None

    def __init__(self, blocks: Sequence[FlatBlock], side: SideStream):
        self._side, self._flat = side, []
        self.buffers: Sequence[torch.Tensor] = ()  # beside the blocks themselves
        self.slot_bytes = max(block.size for block in blocks)
        buffers = _host_buffers([block.size for block in blocks], side.device)
        for block, flat in zip(blocks, buffers, strict=True):  # so that no more than a few lie there twice
            block.move(flat)
            self._flat.append(flat)

    def begin(self, number: int) -> None:
        """Do nothing: a block can be brought at any time."""

    def bring(self, number: int, slot: torch.Tensor) -> object:
        """Copy a block to the begin of a slot on the device; return what to wait for."""
        flat = self._flat[number]
        return self._side.copy([(slot[: len(flat)], flat)])


def _host_buffers(sizes: list[int], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield host memory of each size; what shares an allocation is taken when the first of it is asked for.

    A plan, whose model may have fewer blocks, counts the sizes alone and adds ``spare_bytes`` for all of them.
    """
    if device.type == "meta":
        with category("offloaded"):
            exact = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        yield from exact
        return
    for here in shared_allocations(sizes):
        yield from host_memory(sum(here), device).split(here)


class ReadAhead:
    """The placement of blocks in memory-mapped files, from which pinned buffers bring them to the device.

    What a process maps of a file comes from the disk when it is first touched, and is dropped again when memory is
    short. A GPU cannot copy it beside its computation, since it is not pinned; so a thread copies a block into one of
    two pinned buffers, a block or two before it is needed, which is when the disk is read, while the GPU computes, and
    from there it goes to the GPU as any other.

    Args:
        fills: for each block, a function that copies it to the begin of a buffer.
        sizes: of the blocks, in bytes.
        side: the stream of the copies to the device.
    """

    in_files, gathers = True, False
    shards: Sequence[torch.Tensor] = ()
    gradients: Gradients | None = None

    def __init__(self, fills: Sequence[Callable[[torch.Tensor], None]], sizes: Sequence[int], side: SideStream):
        self._fills, self._sizes, self._side = fills, sizes, side
        self.slot_bytes = max(sizes)
        self.buffers: Sequence[torch.Tensor] = [host_memory(self.slot_bytes, side.device) for _ in range(BUFFERS)]
        self._last_copy: list[object] = [None] * BUFFERS  # the end of the last copy from each
        self._next = 0  # buffer, in turn
        self._reading: dict[int, tuple[int, Future | None]] = {}  # by block: its buffer, and when it is whole
        # A plan's tensors have no values, and no time.
        self._executor = None if side.device.type == "meta" else ThreadPoolExecutor(1, "qlora_lite read ahead")

    def begin(self, number: int) -> None:
        """Begin to read a block; what was read into the buffer that is next and never brought is forgotten."""
        if number in self._reading:
            return
        here, self._next = self._next, (self._next + 1) % BUFFERS
        self._reading = {block: reading for block, reading in self._reading.items() if reading[0] != here}
        self._side.wait_on_host(self._last_copy[here])
        self._reading[number] = here, self._read(number, self.buffers[here])

    def _read(self, number: int, buffer: torch.Tensor) -> Future | None:
        if self._executor is not None:
            return self._executor.submit(self._fills[number], buffer)
        with category("on disk"):  # no tensor is born here; the mark tells a ``WorkCounter`` what the disk gives
            self._fills[number](buffer)
        return None

    def bring(self, number: int, slot: torch.Tensor) -> object:
        """Copy a block to the begin of a slot on the device, when it has been read; return what to wait for."""
        self.begin(number)
        here, reading = self._reading.pop(number)
        if reading is not None:
            reading.result()
        size = self._sizes[number]
        self._last_copy[here] = self._side.copy([(slot[:size], self.buffers[here][:size])])
        return self._last_copy[here]


def in_files(blocks: Sequence[FlatBlock], side: SideStream) -> ReadAhead:
    """Leave blocks in the files that they were loaded from, which the process sees as memory."""
    return ReadAhead([block.fill for block in blocks], [block.size for block in blocks], side)


class Division(NamedTuple):
    """How blocks are divided among ranks: the weight of each one's part, and which of them this one is."""

    weights: tuple[int, ...] = (1,)
    rank: int = 0

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return len(self.weights)

    def sizes(self, size: int) -> list[int]:
        """Return how large each rank's part of a block is, each rounded up on its own."""
        return [-(-size * weight // (sum(self.weights) * ALIGNMENT)) * ALIGNMENT for weight in self.weights]

    def own_bytes(self, size: int) -> int:
        """Return how large this rank's part of a block is."""
        return self.sizes(size)[self.rank]


UNDIVIDED = Division()


class Ranks(Protocol):
    """The processes among which blocks are divided: which of how many this one is, and what puts parts together."""

    rank: int
    count: int

    def gather(self, whole: torch.Tensor, sizes: Sequence[int], own: torch.Tensor) -> None:
        """Fill a buffer with the parts of all ranks in order; each calls it for the same buffers in the same order."""

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Give each rank its row of a buffer [ranks, bytes], and get from each the row that it has for this one."""


class PlannedRanks:
    """Ranks of a plan, whose tensors have no values: what comes from the others is counted."""

    def __init__(self, division: Division):
        self.rank, self.count = division.rank, division.count

    def gather(self, whole: torch.Tensor, sizes: Sequence[int], own: torch.Tensor) -> None:
        """See ``Ranks``."""
        others = whole[len(own) :]
        with category("on other ranks"):  # no tensor is born here; the mark tells a ``WorkCounter`` what takes the wire
            others.copy_(others)

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See ``Ranks``."""
        with category("on other ranks"):
            received[1:].copy_(sent[1:])


class OnAllRanks:
    """The placement of blocks of which each rank has one part, as large as its weight says.

    What a block's modules hold while it is nowhere whole is what they were loaded with: pages of a file, or host
    memory where weights had to be converted.

    Args:
        blocks: see ``PlacementFactory``, as is the next.
        ranks: all that have a part.
        weights: of their parts.
        in_host_memory: where parts wait, each rank's in its own; else on its device.
        in_files: blocks are pages of a file.
    """

    gathers = True
    gradients: Gradients | None = None

    def __init__(
        self,
        blocks: Sequence[FlatBlock],
        side: SideStream,
        ranks: Ranks,
        weights: Sequence[int],
        in_host_memory: bool = False,
        in_files: bool = True,
    ):
        self.in_files = in_files
        self._side, self._ranks, self._in_host_memory = side, ranks, in_host_memory
        self._sizes = [Division(tuple(weights)).sizes(block.size) for block in blocks]  # of all ranks
        own = [sizes[ranks.rank] for sizes in self._sizes]
        self._parts = list(_host_buffers(own, side.device) if in_host_memory else _device_buffers(own, side.device))
        for block, part, sizes in zip(blocks, self._parts, self._sizes, strict=True):
            block.fill_part(part, sum(sizes[: ranks.rank]))
        self.buffers, self.shards = (self._parts, ()) if in_host_memory else ((), self._parts)
        self.slot_bytes = max(map(sum, self._sizes))

    def begin(self, number: int) -> None:
        """Do nothing: a block can be brought at any time."""

    def bring(self, number: int, slot: torch.Tensor) -> object:
        """Put a block together at the begin of a slot; return what to wait for."""
        own, sizes = self._parts[number], self._sizes[number]
        whole = slot[: sum(sizes)]
        if self._in_host_memory:
            on_host, own = own, whole.split(sizes)[self._ranks.rank]
            self._side.copy([(own, on_host)])
        return self._side.launch(partial(self._ranks.gather, whole, sizes, own))


def _device_buffers(sizes: Sequence[int], device: torch.device) -> Iterator[torch.Tensor]:
    for size in sizes:
        with category("base weights"):
            yield torch.empty(size, dtype=torch.uint8, device=device)


def flat_sizes(blocks: Sequence[nn.Module]) -> list[int]:
    """Return the bytes of each block's frozen tensors in a flat buffer."""
    return [FlatBlock(block).size for block in blocks]


def spare_bytes(sizes: list[int]) -> int:
    """Return what pinned memory for blocks of these sizes takes beyond them."""
    return sum(pinned_bytes(sum(here)) for here in shared_allocations(sizes)) - sum(sizes)


def shared_allocations(sizes: list[int]) -> list[list[int]]:
    """Cut sizes into groups that take the least where each is given a whole power of two, and into few of them."""
    sums = list(accumulate(sizes, initial=0))
    best = [(0, 0, 0)]  # for so many of the first sizes: bytes, groups, and where the last group begins
    for end in range(1, len(sums)):
        best.append(
            min(
                (best[start][0] + pinned_bytes(sums[end] - sums[start]), best[start][1] + 1, start)
                for start in range(end)
                if start == end - 1 or sums[end] - sums[start] <= MAX_AT_ONCE_BYTES
            )
        )
    groups, end = [], len(sizes)
    while end:
        groups.insert(0, sizes[best[end][2] : end])
        end = best[end][2]
    return groups


class BlockStream:
    """The streamed blocks of a model.

    Args:
        blocks: in the order they run; each must run with checkpointing while it is trained.
        device: where they compute.
        placement: puts their tensors where they are kept: ``InHostMemory``, ``in_files`` or ``OnAllRanks``.
        trains: stream weights that are trained, too; in host memory only.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        placement: PlacementFactory = InHostMemory,
        trains: bool = False,
    ):
        self.side = SideStream(device)
        self._blocks = [FlatBlock(block, trains, self._leave) for block in blocks]
        self._trains = trains
        self.sizes = [block.size for block in self._blocks]
        self.placement = placement(self._blocks, self.side)
        self._gradients: Gradients = self.placement.gradients or ToHost(self.side)
        self._homes = {_home(place.tensor) for block in self._blocks for place in block.places}
        with category("base weights"):
            self._slots = [
                torch.empty(self.placement.slot_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)
            ]
        self._in_slot: list[int | None] = [None] * SLOTS
        self._arrival: dict[int, torch.cuda.Event | None] = {}
        self._current: int | None = None
        for number, block in enumerate(blocks):
            # Whichever part runs first brings the block. (Hooks of the block itself do not see a recomputation: since
            # transformers 5.20 checkpointing stands between them and forward. Those of diffusers do, and PixArt's begin
            # with a parameter of their own.)
            own = [block] if any(True for _ in block.parameters(recurse=False)) else []
            for part in (*own, *block.children()):
                part.register_forward_pre_hook(self._entering(number))

    def _entering(self, number: int):
        def enter(module, _inputs):
            self.enter(number, module.training)

        return enter

    def enter(self, number: int, turns: bool = True) -> None:
        """Have a block on the device, begin to bring the next one in the direction of travel, and to read the one
        behind that.

        Args:
            turns: backward follows the last block, and not another forward pass.
        """
        if number == self._current:
            return
        if self._gradients.waiting:
            self._gradients.hand_over(before=number)
        begins = number == 0 or self._current is None  # a forward pass, which may follow another
        step = 1 if begins or number > self._current else -1
        if number not in self._in_slot:
            self._load(number)
        self.side.wait(self._arrival[number])
        self._current = number
        if self._is_elsewhere(number + step):
            self._load(number + step)
        onward = [number + 2 * step]
        if number == len(self._blocks) - 1:
            onward = [number - 2] if turns else [0, 1]
        for other in filter(self._is_elsewhere, onward):
            self.placement.begin(other)

    def _leave(self, place: Place, copy: nn.Parameter) -> None:
        assert self._current is not None  # whose backward pass this is
        self._gradients.leave(self._current, place, copy)

    def end_backward(self) -> None:
        """Give all trained weights their gradients, and forget copies of them: they have been updated since."""
        self._gradients.hand_over(before=None)
        if self.trained:
            self.settle()

    def forget(self) -> None:
        """Drop what a backward pass that broke off has left: gradients on their way, and parts of some on copies."""
        self._gradients.forget()
        self.settle()

    def settle(self) -> None:
        """Let modules hold the weights that are trained, in place of copies on the device.

        Where none are, all stays: what one rank alone let go of, it could not get back from the others.
        """
        if not self._trains:
            return
        for block in self._blocks:
            block.show(None)
        self._in_slot, self._current = [None] * SLOTS, None

    @property
    def trained(self) -> list[torch.Tensor]:
        """The weights that are trained at present."""
        return [place.tensor for block in self._blocks for place in block.places if place.tensor.requires_grad]

    def _is_elsewhere(self, number: int) -> bool:
        return 0 <= number < len(self._blocks) and number not in self._in_slot

    def _load(self, number: int) -> None:
        slot = next(slot for slot, holds in enumerate(self._in_slot) if holds is None or holds != self._current)
        evicted, flat = self._in_slot[slot], self._slots[slot]
        if evicted is not None:
            self._blocks[evicted].show(None)
        self._arrival[number] = self.placement.bring(number, flat)
        self._in_slot[slot] = number
        self._blocks[number].show(flat)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies where the blocks are while they are not on the device."""
        return _home(tensor) in self._homes

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """Host memory that a disk's blocks pass through, uint8."""
        return self.placement.buffers

    @property
    def shards(self) -> Sequence[torch.Tensor]:
        """This rank's parts of sharded blocks, uint8."""
        return self.placement.shards

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """The buffers on the device, uint8."""
        return self._slots
