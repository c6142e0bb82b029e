"""Rows of a weight in host memory are the weight's, and at most two slices of them are on the device."""

import pytest
import torch

from qlora_lite.kernels.loss import Head, chunked_cross_entropy, head_logits
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import pieces, planning_for
from qlora_lite.memory.work import WorkCounter
from qlora_lite.models.host_tables import HostRows

CPU = torch.device("cpu")
WORDS, HIDDEN, TILE = 101, 16, 10


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", {"cpu": TILE})


def weight():
    return torch.randn(WORDS, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 7, TILE, 100, 101, 200])
def test_slices_in_order_are_the_weight_s(size, copies):
    rows = HostRows(weight(), CPU)
    for _ in range(2):  # as for two chunks of tokens
        assert torch.equal(torch.cat([rows[words] for words in pieces(WORDS, size)]), weight())


def test_what_is_asked_for_out_of_order_or_by_number_is_right_too(copies):
    rows = HostRows(weight(), CPU)
    for words in (slice(0, 10), slice(40, 50), slice(10, 20), slice(20, 25), slice(0, 30), slice(30, 60), slice(None)):
        assert torch.equal(rows[words], weight()[words])
    numbers = torch.tensor([5, 100, 5])
    assert torch.equal(rows[numbers], weight()[numbers])


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, WORDS)])
def test_loss_gradient_and_logits_are_those_of_the_weight_to_the_bit(small_tiles, bias, copies):
    hidden, targets = torch.randn(23, HIDDEN), torch.randint(0, WORDS, (23,))
    found = []
    for rows in (weight(), HostRows(weight(), CPU)):
        leaf, head = hidden.clone().requires_grad_(), Head(rows, bias, softcap=2.0)
        loss = chunked_cross_entropy(leaf, targets, head, 8)
        loss.backward()
        found.append((loss.detach(), leaf.grad, head_logits(hidden, head)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def run_loss(device, chunks=2):
    """Return the most bytes of a head in host memory that a loss has on the device, what it leaves there, its work."""
    table = weight().to(device)
    head = Head(HostRows(table, device))  # for longer than the loss, as a model's
    hidden, targets = torch.zeros(8 * chunks, HIDDEN, device=device), torch.zeros(8 * chunks, dtype=int, device=device)
    counter = WorkCounter()
    with Ledger(timeline=True, work=counter) as ledger:
        ledger.claim([table], "offloaded")
        with phase("forward"):
            chunked_cross_entropy(hidden.requires_grad_(), targets, head, 8)
    of_head = [moment.breakdown.get("head", 0) for moment in ledger.timeline]
    return max(of_head), of_head[-1], counter.work


def test_two_slices_are_on_the_device_and_each_travels_once_a_chunk(small_tiles):
    most, left, work = run_loss(CPU)
    assert most == 2 * TILE * HIDDEN * 4
    assert left == 0
    assert work.bus_bytes == 2 * WORDS * HIDDEN * 4


@pytest.mark.parametrize("words", [20, 21, 25, 30, 101])
def test_a_plan_that_leaves_out_pieces_counts_the_same(small_tiles, monkeypatch, words):
    monkeypatch.setattr(f"{__name__}.WORDS", words)
    *real, work = run_loss(CPU, chunks=3)
    with planning_for("cpu"):
        *planned, planned_work = run_loss(torch.device("meta"), chunks=3)
    assert planned_work.bus_bytes == work.bus_bytes == 3 * words * HIDDEN * 4
    assert planned == real
