"""Keep the frozen weights of blocks in host memory and bring each block to the device when it runs.

A block's tensors lie in one flat buffer (pinned beside a card), so that one copy brings them; several blocks share an
allocation, since pinned memory comes in whole powers of two. The device has two slots: while a block computes in one,
the next in the direction of travel (the following in forward, the one before in backward) arrives in the other. Frozen
weights are never written back. 4-bit blocks are what makes this pay: for an 8B model 107 MiB a block, 4 ms over a fast
bus, against 20 ms of products for 2,048 tokens.

A block's modules hold views of its slot while it is there and views of the host buffer otherwise, so that
whatever reads the model's tensors finds the true values. Saved tensors point into a slot: they must be gone
before the slot is used again, which checkpointing per block sees to (autograd's version counters raise otherwise).

Source: the idea of layer-to-layer execution, L2L, arXiv 2002.05645.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.memory.marks import category

from .offload import SideStream, host_memory, pinned_bytes

SLOTS = 2
MOST_AT_ONCE_BYTES = 1 << 32  # of pinned memory; a host that has no room for more can still give less
ALIGNMENT = 512  # bytes; what vector loads and copies of any device are content with, and what a plan counts in


class _Place(NamedTuple):
    """Where one tensor of a block is registered, and where it lies in the flat buffer."""

    registry: dict[str, torch.Tensor | None]
    name: str
    start: int
    tensor: torch.Tensor  # a view of the host buffer

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of another flat buffer."""
        size = self.tensor.nbytes
        found = flat[self.start : self.start + size].view(self.tensor.dtype).view(self.tensor.shape)
        return nn.Parameter(found, False) if isinstance(self.tensor, nn.Parameter) else found


class _HostBlock:
    """The frozen tensors of a block in one flat host buffer."""

    def __init__(self, block: nn.Module, flat: torch.Tensor):
        self.flat, self.places, start = flat, [], 0
        for registry, name, tensor in _frozen(block):
            place = _Place(registry, name, start, tensor).view(flat)
            place.copy_(tensor)
            self.places.append(_Place(registry, name, start, place))
            start += _taken(tensor)
        self.show(None)

    def show(self, flat: torch.Tensor | None) -> None:
        """Let the block's modules see a copy in a slot, or the host buffer."""
        for place in self.places:
            place.registry[place.name] = place.tensor if flat is None else place.view(flat)


def _frozen(block: nn.Module) -> Iterator[tuple[dict, str, torch.Tensor]]:
    for module in block.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and not tensor.requires_grad and tensor.numel():
                    yield registry, name, tensor


def _taken(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


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


def spare_bytes(sizes: list[int]) -> int:
    """Return what pinned memory for blocks of these sizes takes beyond them."""
    return sum(pinned_bytes(sum(here)) for here in shared_allocations(sizes)) - sum(sizes)


def shared_allocations(sizes: list[int]) -> list[list[int]]:
    """Cut sizes into groups that take the least where each is given a whole power of two, and into few of them."""
    sums = list(accumulate(sizes, initial=0))
    best = [(0, 0, 0)]  # for so many of the first sizes: bytes, groups, and where the last group begins
    for end in range(1, len(sums)):
        best.append(min(
            (best[start][0] + pinned_bytes(sums[end] - sums[start]), best[start][1] + 1, start) for start in range(end)
            if start == end - 1 or sums[end] - sums[start] <= MOST_AT_ONCE_BYTES
        ))  # fmt: skip
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
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.side = SideStream(device)
        self.sizes = [sum(_taken(tensor) for _, _, tensor in _frozen(block)) for block in blocks]
        buffers = _host_buffers(self.sizes, device)
        self._blocks = [_HostBlock(block, flat) for block, flat in zip(blocks, buffers, strict=True)]
        self._storages = {block.flat.untyped_storage()._cdata for block in self._blocks}
        with category("base weights"):
            self._slots = [torch.empty(max(self.sizes), dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._in_slot: list[int | None] = [None] * SLOTS
        self._arrival: dict[int, torch.cuda.Event | None] = {}
        self._current: int | None = None
        for number, block in enumerate(blocks):
            # Whichever part runs first brings the block. (Hooks of the block itself do not see a second run: since
            # transformers 5.20 checkpointing stands between them and forward.)
            for part in block.children():
                part.register_forward_pre_hook(self._entering(number))

    def _entering(self, number: int):
        def enter(_module, _inputs):
            self.enter(number)

        return enter

    def enter(self, number: int) -> None:
        """Have a block on the device, and begin to bring the next one in the direction of travel."""
        if number == self._current:
            return
        begins = number == 0 or self._current is None  # a forward pass, which may follow another
        onward = number + 1 if begins or number > self._current else number - 1
        if number not in self._in_slot:
            self._load(number)
        self.side.wait(self._arrival[number])
        self._current = number
        if 0 <= onward < len(self._blocks) and onward not in self._in_slot:
            self._load(onward)

    def _load(self, number: int) -> None:
        slot = next(slot for slot, holds in enumerate(self._in_slot) if holds is None or holds != self._current)
        evicted, block, flat = self._in_slot[slot], self._blocks[number], self._slots[slot]
        if evicted is not None:
            self._blocks[evicted].show(None)
        self._arrival[number] = self.side.copy([(flat[: len(block.flat)], block.flat)])
        self._in_slot[slot] = number
        block.show(flat)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor lies in one of the host buffers."""
        return tensor.untyped_storage()._cdata in self._storages

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """The buffers on the device, uint8."""
        return self._slots
