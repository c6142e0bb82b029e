"""The ledger counts each storage once, from birth to death, under the right name."""

import pytest
import torch
from torch import nn

from qlora_lite.memory.ledger import CATEGORIES, Ledger
from qlora_lite.memory.marks import category, phase

KIB = 1024


def live(ledger, name):
    return ledger.live[CATEGORIES.index(name)]


def test_views_and_aliases_count_once_and_a_dead_storage_counts_no_more():
    with Ledger() as ledger:
        x = torch.zeros(256, dtype=torch.float32)
        views = [x.view(16, 16), x[3:], x.detach(), x.t(), x.unflatten(0, (4, 64)).transpose(0, 1)]
        assert ledger.live_bytes == KIB
        del x
        assert ledger.live_bytes == KIB, "the views still hold the storage"
        del views
        assert ledger.live_bytes == 0
        y = torch.ones(128)
        y.add_(1)
        assert ledger.live_bytes == 512
    assert ledger.peak.total == KIB


def test_a_storage_that_grows_in_place_is_counted_at_its_new_size():
    with Ledger() as ledger:
        x = torch.zeros(16)
        x.resize_(64)
        assert ledger.live_bytes == x.untyped_storage().nbytes() == 256


def test_a_number_that_a_tensor_is_added_to_is_no_tensor():
    """Phi-MoE's router does so."""
    with Ledger() as ledger, torch.no_grad():
        total = torch.add(0.5, torch.ones(256), alpha=2)
        assert ledger.live_bytes == KIB and total[0] == 2.5


def test_several_results_of_one_operation_are_all_counted():
    with Ledger() as ledger:
        values, indices = torch.zeros(8, 32).max(dim=1)
        assert ledger.live_bytes == values.nbytes + indices.nbytes


def test_sizes_can_be_rounded_up_as_an_allocator_does():
    with Ledger(allocation_bytes=512) as ledger:
        kept = [torch.zeros(1), torch.zeros(129)]
        assert ledger.live_bytes == 512 + 1024
        del kept
        assert ledger.live_bytes == 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def one_step(ledger, net, x):
    """Run a step of plain SGD with momentum under the ledger."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with ledger:
        ledger.claim(net.parameters(), "adapter")
        ledger.claim([x], "workspace")
        ledger.watch(net)
        with phase("forward"):
            loss = net(x).square().sum()
        saved = live(ledger, "saved activations")
        with phase("backward"):
            loss.backward()
        gradients, left = live(ledger, "gradients"), live(ledger, "saved activations")
        with phase("optimizer"), category("optimizer"):
            optimizer.step()
        states = live(ledger, "optimizer")
        optimizer.zero_grad()
    return saved, gradients, left, states


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_categories_come_from_where_tensors_are_born(device):
    with torch.device(device):
        net, x = Net(), torch.zeros(16, 32)
        ledger = Ledger()
        saved, gradients, left, states = one_step(ledger, net, x)
    weights = sum(p.nbytes for p in net.parameters())
    assert gradients == states == live(ledger, "adapter") == weights
    hidden, output = 16 * 64 * 4, 16 * 8 * 4
    assert saved == x.nbytes + hidden + output  # tanh's result, the squared output, and the input
    assert left <= x.nbytes, "backward frees what it used"
    assert live(ledger, "gradients") == 0


def test_tensors_with_and_without_memory_give_the_same_peaks():
    ledgers = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            ledgers.append(Ledger())
            one_step(ledgers[-1], Net(), torch.zeros(16, 32))
    assert ledgers[0].peaks == ledgers[1].peaks


def test_the_peak_names_its_phase_and_module_in_forward_and_in_backward():
    net, x = Net(), torch.zeros(1000, 32)
    ledger = Ledger()
    one_step(ledger, net, x)
    assert ("forward", "first") in ledger.peaks and ("forward", "second") in ledger.peaks
    assert ("backward", "second") in ledger.peaks and ("backward", "first") in ledger.peaks
    assert ledger.peak.phase == "backward"
    assert sum(ledger.peak.breakdown.values()) == ledger.peak.total


def test_nothing_is_left_behind_on_the_model():
    net = Net()
    one_step(Ledger(), net, torch.zeros(4, 32))
    assert not net._forward_hooks and not net.first._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_the_timeline_holds_every_change_and_its_highest_point_is_the_peak():
    ledger = Ledger(timeline=True)
    one_step(ledger, Net(), torch.zeros(16, 32))
    assert max(moment.total for moment in ledger.timeline) == ledger.peak.total
    assert {moment.phase for moment in ledger.timeline} >= {"forward", "backward", "optimizer"}


def test_what_an_operator_saves_of_its_own_result_dies_with_it_without_a_backward():
    weight = torch.ones(256, requires_grad=True)
    with Ledger() as ledger:
        result = weight.exp()
        assert live(ledger, "saved activations") == ledger.live_bytes == KIB
        del result
        assert ledger.live_bytes == 0


def test_bytes_in_host_memory_are_not_counted_as_the_device_s():
    with Ledger() as ledger:
        with category("offloaded"):
            host = torch.empty(5 * KIB, dtype=torch.uint8)
        view = host[: 3 * KIB].view(torch.float32)
        assert live(ledger, "offloaded") == ledger.offloaded_peak_bytes == 5 * KIB
        assert ledger.live_bytes == 0
        del host, view
        assert live(ledger, "offloaded") == 0


def test_what_goes_to_host_memory_leaves_the_device_and_comes_back():
    with Ledger() as ledger:
        x = torch.zeros(256)
        for category_, on_device in (("offloaded", 0), ("on disk", 0), ("logits", KIB), ("gradients", KIB)):
            ledger.claim([x], category_)
            assert ledger.live_bytes == ledger.now().total == on_device
            assert live(ledger, category_) == sum(ledger.live) == KIB
        assert ledger.offloaded_peak_bytes == ledger.disk_peak_bytes == KIB


def test_a_tensor_without_a_graph_is_saved_as_it_is():
    ran = []

    def run(func, args, kwargs):
        ran.append(func)
        return func(*args, **kwargs)

    weight = torch.ones(4, requires_grad=True)
    with Ledger(run=run) as ledger:
        ledger.claim([weight], "adapter")
        weight * weight
        assert ran == [torch.ops.aten.mul.Tensor] and live(ledger, "adapter") == weight.nbytes


class _Doubled(torch.autograd.Function):
    """Two gradients that are added up by the function itself, and not by the engine."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 1 * grad + 1 * grad


def _most_in_backward(device, function):
    """Return how many tensors of x's size there are at most during backward, beside what was there before."""
    x = torch.ones(1024, device=device, requires_grad=True)
    with Ledger() as ledger:
        y = function(x * 1)
        grad = torch.ones_like(y)
        before = ledger.live_bytes
        ledger.peaks.clear()
        torch.autograd.backward(y, grad)
        return (ledger.peak.total - before) / x.nbytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_sum_of_two_gradients_takes_no_third_tensor_where_the_engine_adds_in_place(device):
    """As torch without a mode does: to a gradient that is held by nothing else."""
    constants = [torch.ones(1024, device=device) for _ in range(3)]

    def branches(count):
        return lambda y: torch.stack([y * each for each in constants[:count]]).sum(0)

    assert _most_in_backward(device, branches(2)) == _most_in_backward(device, branches(3)) == 2
    assert _most_in_backward(device, _Doubled.apply) == 3
