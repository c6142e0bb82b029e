"""Packed sequences in one call of a GPU's kernel equal each attended to by itself."""

import pytest
import torch
from counted import counted
from test_attention import eager

from qlora_lite.kernels import attention, fused_attention, packed_attention
from qlora_lite.kernels.attention import row_attention
from qlora_lite.kernels.packed_attention import kernel_takes, sequence_ends
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.planning.plan_ledger import PlanLedger
from qlora_lite.train.determinism import deterministic

HEADS, SIZE, LENGTHS = 8, 32, (40, 1, 23, 64)
TOKENS = sum(LENGTHS)


def attended(query, key, value, ends, window):
    lengths = ends.diff().tolist()
    inputs = (tensor[None].transpose(1, 2) for tensor in (query, key, value))
    return eager(*inputs, lengths, 0.3, window)[0].to(query.dtype)


def on_cpu(query, key, value, ends, _ends, longest, _longest, dropout, causal, _debug, *, scale, **sees):
    """A GPU's kernel over packed sequences, by the oracle."""
    assert scale == 0.3 and dropout == 0 and longest == int(ends.diff().max()) and causal == (not sees)
    window = sees["window_size_left"] + 1 if sees else None
    assert not sees or sees["window_size_right"] == 0
    out = attended(query, key, value, ends, window)
    return out, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), torch.zeros(2), torch.zeros(()), None


def backward_on_cpu(grad, query, key, value, out, logsumexp, ends, _ends, *rest, scale, **sees):
    assert out.shape == grad.shape == query.shape and logsumexp.shape == query.shape[1::-1]
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        found = attended(*inputs, ends, sees["window_size_left"] + 1 if sees else None)
    return torch.autograd.grad(found, inputs, grad)


@pytest.fixture
def card(monkeypatch):
    """Give each call's heads; a CPU's tensors go as a GPU's do."""
    heads = []

    def backward(*args, **options):
        heads.append(args[1].shape[1])
        return backward_on_cpu(*args, **options)

    monkeypatch.setattr(packed_attention, "FORWARD", on_cpu)
    monkeypatch.setattr(packed_attention, "BACKWARD", backward)
    monkeypatch.setattr(attention, "kernel_takes", lambda *_: True)
    with planning_for("cuda"):
        yield heads


def inputs_of(key_heads, device="cpu", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, TOKENS, heads, SIZE) for heads in (HEADS, key_heads, key_heads)]
    found = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [tensor.transpose(1, 2).requires_grad_() for tensor in found]


def attend(*tensors, window=None, lengths=LENGTHS):
    ends = sequence_ends(lengths, tensors[0].device)
    return row_attention(None, *tensors, None, 0.3, 0.0, window, row_lengths=lengths, row_ends=ends)[0]


@pytest.mark.parametrize(("key_heads", "most", "calls"), [(8, 2**30, 1), (2, 2**30, 1), (2, 1, 2), (8, 1, 8)])
@pytest.mark.parametrize("window", [None, 5, 64])
def test_values_and_gradients_are_those_of_each_sequence_alone(window, key_heads, most, calls, card, monkeypatch):
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", most)
    inputs = inputs_of(key_heads)
    upstream = torch.randn(1, TOKENS, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    out = attend(*inputs, window=window)
    found = [out, *torch.autograd.grad(out, inputs, upstream.bfloat16())]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = eager(*exact, LENGTHS, 0.3, window)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, upstream.bfloat16().double())]
    for tensor, expected in zip(found, wanted, strict=True):
        assert (tensor - expected).norm() <= 0.01 * expected.norm()
    assert card == [HEADS // calls] * calls


def test_a_block_s_second_run_takes_what_its_first_kept(card):
    inputs, found = inputs_of(2), []
    for keeps_attention in (False, True):
        out = Checkpoint(keeps_attention=keeps_attention)(attend, *inputs)
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "change",
    [
        {"repeatable": True},
        {"tokens": TOKENS + 1},
        {"dtype": torch.float32},
        {"size": 30},
        {"size": 208},
        {"batch": 2},
        {"device": "cpu"},
        {"on_gpu": False},
        {},
    ],
)
def test_the_kernel_is_for_what_flash_attention_takes_and_no_token_behind_the_sequences(change):
    said = {"tokens": TOKENS, "size": SIZE, "batch": 1, "dtype": torch.bfloat16, "device": "meta", "on_gpu": True}
    said |= {"repeatable": False} | change
    shape = said["batch"], HEADS, said["tokens"], said["size"]
    query = torch.empty(shape, dtype=said["dtype"], device=said["device"])
    with planning_for("cuda" if said["on_gpu"] else "cpu"), deterministic(said["repeatable"]):
        assert kernel_takes(query, query, query, LENGTHS) == (not change)


def planned(lengths, most, key_heads=2, window=None):
    """Return a counter and the peak in backward of a planned call."""
    with pytest.MonkeyPatch.context() as patch, planning_for("cuda"):
        patch.setattr(fused_attention, "MAX_SCRATCH_BYTES", most)
        inputs = inputs_of(key_heads, "meta")
        with counted() as counter:
            with phase("forward"):
                out = attend(*inputs, window=window, lengths=lengths)
            with phase("backward"), PlanLedger("cuda", allocation_bytes=1) as ledger:
                torch.autograd.grad(out, inputs, torch.empty_like(out))
    return counter.work, ledger.peak.total


@pytest.mark.parametrize("window", [None, 5])
def test_a_plan_counts_the_scores_of_each_sequence(window):
    scores = sum(sum(min(place + 1, window or place + 1) for place in range(length)) for length in LENGTHS)
    work, _ = planned(LENGTHS, 2**30, window=window)
    assert work.flops == pytest.approx(2 * HEADS * SIZE * scores * (2 + 5), rel=0.06)  # half of a diagonal each


def test_a_plan_counts_what_the_kernel_takes_inside_and_128_tokens_more_a_sequence(monkeypatch):
    (_, one), (_, many) = planned((TOKENS,), 2**30, window=5), planned((1,) * TOKENS, 2**30)
    assert many - one == 4 * HEADS * 128 * (TOKENS - 1) * (1 + SIZE)
    monkeypatch.setattr(packed_attention, "flash_bytes", lambda *_: 0)
    _, without = planned((TOKENS,), 2**30, window=5)
    for_each_head_of_the_query = 2 * 2 * HEADS * TOKENS * SIZE  # gradients of key and value, bfloat16
    assert one - without == 4 * HEADS * (TOKENS + 128) * (1 + SIZE) + for_each_head_of_the_query


def test_a_plan_of_a_backward_over_few_heads_counts_their_share():
    (_, whole), (_, shared) = planned(LENGTHS, 2**30), planned(LENGTHS, 1)
    assert shared < 0.8 * whole


def test_operators_and_bytes_do_not_grow_with_the_sequences():
    (one, _), (many, _) = planned((TOKENS,), 2**30, window=5), planned((2,) * (TOKENS // 2), 2**30)
    assert (one.operations, one.moved_bytes) == (many.operations, many.moved_bytes)


def test_sequences_one_after_the_other_are_cut_once():
    """Backward of a slice is as large as the whole."""
    works = []
    for lengths in ((32,) * 4, (2,) * 64):
        inputs = inputs_of(2, "meta")
        with planning_for("cuda"), counted() as counter:
            with phase("forward"):
                out = row_attention(None, *inputs, None, row_lengths=lengths)[0]
            with phase("backward"):
                torch.autograd.grad(out, inputs, torch.empty_like(out))
        works.append(counter.work.moved_bytes)
    assert works[1] <= 1.01 * works[0]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_on_a_gpu_values_and_gradients_are_those_of_each_sequence_alone(window):
    inputs = inputs_of(2, "cuda")
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attend(*inputs, window=window)
    found = [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = eager(*exact, LENGTHS, 0.3, window)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, torch.ones_like(wanted))]
    for tensor, expected in zip(found, wanted, strict=True):
        assert (tensor - expected).norm() <= 0.02 * expected.norm()
