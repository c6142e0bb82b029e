"""Blocks that lie in files are read before they are needed, and never into memory that is still being copied."""

import threading

import pytest
import torch

from qlora_lite.offload.offload import SideStream
from qlora_lite.offload.stream import BUFFERS, BlockStream, ReadAhead, in_files

CPU, SIZE = torch.device("cpu"), 8


class Fills(list):
    """What is read, in this order: a block's bytes are its number."""

    def of(self, count):
        def fill(number, buffer):
            self.append(number)
            buffer.fill_(number)

        return [lambda buffer, number=number: fill(number, buffer) for number in range(count)]


def slot():
    return torch.full((SIZE,), 255, dtype=torch.uint8)


def test_a_block_is_brought_whether_its_reading_has_begun_or_not():
    fills = Fills()
    reading = ReadAhead(fills.of(5), [SIZE, SIZE, 3, SIZE, SIZE], SideStream(CPU))
    reading.begin(1)
    reading.begin(1)
    for number, expected in ((0, [0] * 8), (1, [1] * 8), (2, [2] * 3 + [255] * 5), (0, [0] * 8)):
        here = slot()
        reading.bring(number, here)
        assert here.tolist() == expected
    assert fills == [1, 0, 2, 0], "what has begun is not read twice"
    assert [len(buffer) for buffer in reading.buffers] == [SIZE] * BUFFERS


def test_a_block_that_nobody_asked_for_gives_its_buffer_to_another():
    fills, here = Fills(), slot()
    reading = ReadAhead(fills.of(5), [SIZE] * 5, SideStream(CPU))
    for number in (3, 4, 0, 1):
        reading.begin(number)
    for number in (1, 0, 3):
        reading.bring(number, here)
        assert here.unique().tolist() == [number]
    assert fills == [3, 4, 0, 1, 3]


def test_a_block_is_read_beside_the_computation():
    may_read, has_begun = threading.Event(), threading.Event()

    def fill(buffer):
        has_begun.set()
        assert may_read.wait(10)
        buffer.fill_(7)

    here, reading = slot(), ReadAhead([fill], [SIZE], SideStream(CPU))
    reading.begin(0)  # returns
    assert has_begun.wait(10)
    may_read.set()
    reading.bring(0, here)
    assert here.unique().tolist() == [7]


def test_an_error_of_the_thread_is_one_of_the_step_that_needs_the_block():
    def fill(_buffer):
        raise RuntimeError("no such place")

    reading = ReadAhead([fill], [SIZE], SideStream(CPU))
    reading.begin(0)
    with pytest.raises(RuntimeError, match="no such place"):
        reading.bring(0, slot())


def test_a_buffer_is_written_only_after_the_last_copy_from_it_has_ended():
    class Numbered(SideStream):
        """Events are numbers, from 1 on; ``ended`` are those that the host waited for."""

        begun, ended = 0, ()

        def copy(self, pairs):
            super().copy(pairs)
            self.begun += 1
            return self.begun

        def wait_on_host(self, event):
            self.ended += (event,)

    side = Numbered(CPU)
    reading = ReadAhead(Fills().of(4), [SIZE] * 4, side)
    for number in (0, 1):
        reading.bring(number, slot())
    assert side.ended == (None, None)
    reading.begin(2)
    assert side.ended == (None, None, 1)
    reading.begin(3)
    assert side.ended == (None, None, 1, 2)


@pytest.fixture
def run_blocks(monkeypatch):
    """Run streamed blocks in an order; return what was read and run."""
    blocks = [torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False)) for _ in range(6)]
    BlockStream(blocks, CPU, in_files)  # which its hooks keep
    order, read = [], ReadAhead._read

    def noted(self, number, buffer):
        order.append(f"read {number}")
        return read(self, number, buffer)

    def run(numbers, training):
        order.clear()
        for number in numbers:
            blocks[number].train(training)(torch.zeros(1, 2))
            order.append(f"run {number}")
        return order

    monkeypatch.setattr(ReadAhead, "_read", noted)
    return run


def test_blocks_are_read_one_before_the_next_and_backward_from_the_last_block_on(run_blocks):
    order = run_blocks((*range(6), *range(4, -1, -1)), training=True)
    forward = ["read 0", "read 1", "read 2", "run 0", "read 3", "run 1", "read 4", "run 2", "read 5", "run 3", "run 4"]
    backward = ["read 3", "run 5", "read 2", "run 4", "read 1", "run 3", "read 0", "run 2", "run 1", "read 2", "run 0"]
    assert order == forward + backward, "and at the end the first that the next step misses"


def test_where_no_backward_follows_the_first_blocks_are_read_for_the_next_pass(run_blocks):
    run_blocks(range(6), training=False)
    again = [
        "read 2",
        "run 0",
        "read 3",
        "run 1",
        "read 4",
        "run 2",
        "read 5",
        "run 3",
        "run 4",
        "read 0",
        "read 1",
        "run 5",
    ]
    for _ in range(2):
        assert run_blocks(range(6), training=False) == again
