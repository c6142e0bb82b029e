"""What a GPU's tensor was on the host is known for as long as it is true."""

import gc

import pytest
import torch

from qlora_lite.kernels.loss import Head, chunked_cross_entropy
from qlora_lite.models.host_tables import HostEmbedding, HostRows
from qlora_lite.offload import transfer

pytestmark = pytest.mark.gpu

IDS = torch.arange(12)[None]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def known(here=IDS):
    return transfer.remembered(transfer.sent(here, CUDA), here)


def test_values_are_those_that_were_sent_and_nothing_is_copied_back(no_copies_back):
    there = known()
    assert transfer.on_host(there, CPU) is IDS
    assert torch.equal(transfer.on_host(transfer.part(there, (slice(None), slice(3, 7))), CPU), IDS[:, 3:7])


def test_a_tensor_that_was_written_to_is_copied_back():
    there = known()
    there += 1
    for tensor in (there, transfer.part(there, slice(None))):
        assert torch.equal(transfer.on_host(tensor, CPU), IDS + 1)


def test_nothing_is_remembered_of_tensors_that_are_gone():
    known()
    gc.collect()
    assert not len(transfer._on_host)


def test_rows_of_tables_in_host_memory_come_without_asking_the_gpu(no_copies_back):
    torch.manual_seed(0)
    table = torch.nn.Embedding(12, 4)
    found = HostEmbedding(table, CUDA)(known())
    targets, hidden = torch.tensor([3, 1, 7]), torch.randn(3, 4)
    head = Head(HostRows(table.weight.detach().pin_memory(), CUDA))
    loss = chunked_cross_entropy(hidden.to(CUDA).requires_grad_(), known(targets), head, 2)
    no_copies_back.undo()
    assert torch.equal(found.cpu(), table(IDS))
    expected = torch.nn.functional.cross_entropy(hidden @ table.weight.t(), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def no_copies_back(monkeypatch):
    """Have every copy of whole numbers from the GPU to the host fail."""
    plain = torch.Tensor.to

    def to(tensor, *to_what, **more):
        assert not (tensor.is_cuda and not tensor.is_floating_point() and CPU in to_what), "copied back"
        return plain(tensor, *to_what, **more)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return monkeypatch
