"""Streamed blocks are on the device when they run, and the next one is on its way."""

from random import Random

import pytest
import torch

from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.offload.offload import pinned_bytes
from qlora_lite.offload.stream import MAX_AT_ONCE_BYTES, BlockStream, in_files, shared_allocations, spare_bytes


def test_a_forward_pass_after_another_has_its_second_block_under_way_while_the_first_runs(monkeypatch):
    blocks = [torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False)) for _ in range(4)]
    stream, order, load = BlockStream(blocks, torch.device("cpu")), [], BlockStream._load

    def loaded(self, number):
        order.append(f"load {number}")
        load(self, number)

    monkeypatch.setattr(BlockStream, "_load", loaded)
    for _ in range(2):
        order.append("forward")
        for number in range(4):
            stream.enter(number)
            order.append(f"run {number}")
    forward = ["load 0", "load 1", "run 0", "load 2", "run 1", "load 3", "run 2", "run 3"]
    assert order == ["forward", *forward] * 2
    order.clear()
    for number in (2, 1, 0):  # backward, from the last block on
        stream.enter(number)
    assert order == ["load 1", "load 0"]


@pytest.mark.parametrize(
    ("mib", "count", "taken_gib"), [(107, 32, 3.5), (305, 48, 15), (437, 80, 36), (128, 32, 4), (5000, 3, 24)]
)
def test_blocks_share_pinned_memory_so_that_little_of_it_is_wasted(mib, count, taken_gib):
    """Each alone would take 4, 24, 40, 4 and 24 GiB; those of 5,000 MiB are too large to be together."""
    sizes = [mib << 20] * count
    groups = shared_allocations(sizes)
    assert [size for group in groups for size in group] == sizes
    assert all(len(group) == 1 or sum(group) <= MAX_AT_ONCE_BYTES for group in groups)
    assert sum(sizes) + spare_bytes(sizes) == taken_gib * 2**30


def test_blocks_of_any_sizes_take_no_more_together_than_each_alone():
    random = Random(0)
    for _ in range(300):
        sizes = [random.randint(1, 1 << random.randint(1, 33)) for _ in range(random.randint(1, 40))]
        assert 0 <= spare_bytes(sizes) <= sum(pinned_bytes(size) for size in sizes) - sum(sizes)


def test_blocks_that_share_an_allocation_keep_their_own_values(monkeypatch):
    asked = []

    def as_pinned(size, _device):
        asked.append(size)
        return torch.empty(pinned_bytes(size), dtype=torch.uint8)[:size]

    monkeypatch.setattr("qlora_lite.offload.stream.host_memory", as_pinned)
    blocks = [torch.nn.Sequential(torch.nn.Linear(3 + n, 5).requires_grad_(False)) for n in range(7)]
    expected = [[p.clone() for p in block.parameters()] for block in blocks]
    stream = BlockStream(blocks, torch.device("cpu"))
    assert len(asked) < len(blocks) and sum(asked) == sum(stream.sizes)
    for number in (*range(7), *range(5, -1, -1)):
        stream.enter(number)
        for block, values in zip(blocks, expected, strict=True):
            assert all(torch.equal(p, value) for p, value in zip(block.parameters(), values, strict=True))
    assert all(stream.holds(p) or number in (0, 1) for number, block in enumerate(blocks) for p in block.parameters())


def test_what_only_shares_a_storage_with_a_streamed_weight_is_not_one():
    shared, block = torch.zeros(3, 4), torch.nn.Sequential(torch.nn.Module())
    block[0].register_buffer("weight", shared[1])
    stream = BlockStream([block], torch.device("cpu"), in_files)
    assert [stream.holds(row) for row in shared] == [False, True, False]


class Halves:
    """A placement of a caller's own: what another holder has of each block is fetched when it is to be brought."""

    in_files, gathers, buffers, shards, gradients = False, False, (), (), None

    def __init__(self, blocks, side):
        self.begun, self._halves, self.slot_bytes = [], [], max(block.size for block in blocks)
        for block in blocks:
            whole = torch.empty(block.size, dtype=torch.uint8)
            block.fill(whole)
            self._halves.append(whole.chunk(2))
            for place in block.places:
                place.tensor.data.fill_(float("nan"))  # nobody else has the values

    def begin(self, number):
        self.begun.append(number)

    def bring(self, number, slot):
        whole = torch.cat(self._halves[number])
        slot[: len(whole)] = whole


def test_blocks_come_from_wherever_a_placement_has_them():
    blocks = [torch.nn.Sequential(torch.nn.Linear(3, 3).requires_grad_(False)) for _ in range(4)]
    x = torch.randn(2, 3)
    expected = torch.nn.Sequential(*blocks)(x)
    stream = BlockStream(blocks, torch.device("cpu"), Halves)
    for _ in range(2):
        assert torch.equal(torch.nn.Sequential(*blocks)(x), expected)
    assert {2, 3} <= {*stream.placement.begun}


def test_gradients_of_a_backward_pass_that_broke_off_are_forgotten():
    blocks = [torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(5)]
    weights = [parameter for block in blocks for parameter in block.parameters()]
    stream = BlockStream(blocks, torch.device("cpu"), trains=True)

    def step(breaks=False):
        for weight in weights:
            weight.grad = None
        x = torch.ones(2, 3)
        for number, block in enumerate(blocks):
            x = Checkpoint()(block, x)
            if breaks and number == 1:
                x.register_hook(run_out)
        x.sum().backward()
        stream.end_backward()
        return [weight.grad for weight in weights]

    def run_out(_):
        raise MemoryError

    expected = step()
    with pytest.raises(MemoryError):
        step(breaks=True)
    stream.forget()
    assert all(map(torch.equal, step(), expected))
