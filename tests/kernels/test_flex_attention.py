"""Attention by a kernel that torch compiles equals eager attention; torch's own formula stands for it here."""

import pytest
import torch
from counted import counted
from test_attention import eager
from torch.nn.attention import flex_attention as torchs

from qlora_lite.kernels import flex_attention as flex
from qlora_lite.kernels.attention import row_attention
from qlora_lite.kernels.block_attention import block_attention
from qlora_lite.kernels.flex_attention import BLOCK, flex_attention, kernel_takes
from qlora_lite.memory import shapes
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.planning.plan_ledger import PlanLedger, on_real_tensors

HEADS, SIZE, LENGTHS = 4, 16, (150, 1, 30, 270)
SINKS = torch.arange(-1.0, HEADS - 1, dtype=torch.float64)


@pytest.fixture
def compiled(monkeypatch):
    """Have torch trace the function as for a GPU and run its eager formula, whose gradients it denies to a CPU."""
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    counted_by_torch = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counted_by_torch.clear()
    function = torch.compile(flex._flex, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: function)
    return lambda: counted_by_torch["stats"]["unique_graphs"]


def inputs_of(lengths=LENGTHS, key_heads=2, dtype=torch.float64, device="cpu", size=SIZE):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, sum(lengths), heads, size, generator=generator) for heads in (HEADS, key_heads, key_heads))
    return [tensor.to(device, dtype).transpose(1, 2).requires_grad_() for tensor in drawn]


def results(attend, inputs, lengths=LENGTHS, **how):
    """Return the value and the gradients of query, key and value."""
    out = attend(*inputs, lengths, **how)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream)


@pytest.mark.parametrize(
    ("key_heads", "softcap", "sinks"),
    [
        (2, 1.5, SINKS),
        (4, 1.5, None),
        (1, None, SINKS),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_one_mask_over_all_sequences(key_heads, softcap, sinks, compiled):
    for lengths, window in ((LENGTHS, None), (LENGTHS, 140), ((3, 7), 2)):
        inputs = inputs_of(lengths, key_heads)
        how = {"scaling": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
        found = results(flex_attention, inputs, lengths, **how)
        assert found[0].is_contiguous()
        for tensor, wanted in zip(found, results(eager, inputs, lengths, **how), strict=True):
            assert (tensor - wanted).norm() <= 1e-12 * wanted.norm()


def test_one_graph_of_values_and_one_of_gradients_serve_every_micro_batch(compiled):
    for lengths, window in (((150,), None), (LENGTHS, 40), ((64,) * 8, None), ((5, 140), 130)):
        results(flex_attention, inputs_of(lengths), lengths, window=window, softcap=1.5)
    assert compiled() == 2
    flex_attention(*inputs_of(), LENGTHS, softcap=2.5)  # of another model
    assert compiled() == 3


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("lengths", [(129,), (1000,), (1024,), (64,) * 10, (128, 256, 5, 300), (1, 600, 2)])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(lengths, window):
    first, tables = flex._tables(lengths, window, torch.device("cpu"))
    row = torch.repeat_interleave(torch.tensor(lengths))

    def sees(_batch, _head, query, key):
        near = query - key < (window or sum(lengths))
        return (key <= query) & (row[query] == row[key]) & near

    wanted = torchs.create_block_mask(sees, None, None, len(row), len(row), device="cpu", BLOCK_SIZE=BLOCK)
    found = torchs.BlockMask((len(row), len(row)), *tables, BLOCK_SIZE=(BLOCK, BLOCK))
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, numbers = (getattr(found, f"{kind}_{name}") for name in ("num_blocks", "indices"))
        assert torch.equal(count, getattr(wanted, f"{kind}_num_blocks")) and count.dtype == numbers.dtype == torch.int32
        assert torch.equal(numbers, getattr(wanted, f"{kind}_indices"))
    at = torch.arange(len(row))
    seen = (at <= at[:, None]) & (at >= first[:, None])
    assert torch.equal(seen, sees(None, None, at[:, None], at[None]))


@pytest.mark.parametrize("keeps_attention", [False, True])
def test_a_block_of_a_model_is_recomputed_with_the_same_kernel(keeps_attention, compiled, monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.attention.flex_takes", lambda *_: True)
    inputs, calls, values = inputs_of(), [], flex._compiled()
    monkeypatch.setattr(flex, "_compiled", lambda: lambda *args: calls.append(torch.is_grad_enabled()) or values(*args))

    def attend(*tensors, flex=True):
        return row_attention(None, *tensors, None, 0.3, 0.0, 100, 1.5, SINKS, LENGTHS, row_flex=flex)[0]

    with Ledger():  # below which torch compiles nothing
        out = Checkpoint(keeps_attention=keeps_attention)(attend, *inputs)
        found = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert calls == [False] * (1 if keeps_attention else 2) + [True], "values, and what gradients begin with"
    assert compiled() == 2
    calls.clear()
    plain = attend(*inputs, flex=False)
    assert not calls
    for tensor, wanted in zip(found, torch.autograd.grad(plain, inputs, torch.ones_like(plain)), strict=True):
        assert (tensor - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": BLOCK, "lengths": (BLOCK,)},
        {"tokens": sum(LENGTHS) + 1},
        {"size": 8},
        {"size": 288},
        {"batch": 2},
        {"values": 32},
        {"card": "cpu"},
        {"triton": False},
        {"size": 80, "values": 80},
        {},
        {"capability": (7, 5)},
    ],
)
def test_the_kernel_is_for_heads_that_fit_and_more_than_a_block_of_tokens_of_sequences(change, monkeypatch):
    said = {"tokens": sum(LENGTHS), "lengths": LENGTHS, "size": SIZE, "values": SIZE, "batch": 1, "card": "cuda"}
    said |= {"triton": True, "capability": (8, 0)} | change
    query = torch.empty(said["batch"], HEADS, said["tokens"], said["size"], device="meta")
    value = query.new_empty(*query.shape[:3], said["values"])
    monkeypatch.setattr(shapes, "_triton_is_installed", lambda: said["triton"])
    with planning_for(said["card"], said["capability"]):
        assert kernel_takes(query, query, value, said["lengths"]) == (not change or change.get("values") == 80)


@pytest.mark.parametrize(
    ("size", "shared_kib", "is_small"),
    [
        (128, 99, False),
        (192, 99, True),
        (256, 99, True),
        (256, 163, False),
        (256, 227, False),
    ],
)
def test_wide_heads_have_small_tiles_on_gpus_with_little_shared_memory(size, shared_kib, is_small):
    assert bool(flex.kernel_options(size, shared_kib << 10)) == is_small


def planned_work(lengths, window=None):
    inputs = inputs_of(lengths, dtype=torch.bfloat16, device="meta")
    with planning_for("cuda"), counted() as counter, phase("forward"):
        out = flex_attention(*inputs, lengths, window=window, softcap=1.5)
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return counter.work


@pytest.mark.parametrize(("window", "blocks"), [(None, 36), (129, 15), (130, 21)])
def test_a_plan_counts_an_operator_each_way_and_the_scores_of_whole_blocks(window, blocks):
    work = planned_work((8 * BLOCK,), window)
    assert work.flops == 2 * HEADS * SIZE * blocks * BLOCK**2 * (2 + 2 + 7)
    assert work.operations == 2
    packed = planned_work((BLOCK,) * 8)
    assert packed.flops == work.flops * 8 // blocks and packed.operations == 2


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["capped", "sinks"])
def test_a_plan_holds_what_the_kernels_take_inside(sinks):
    tokens = 8 * BLOCK
    inputs = inputs_of((tokens,), dtype=torch.bfloat16, device="meta")
    with planning_for("cuda"), PlanLedger("cuda", allocation_bytes=1) as ledger:
        ledger.claim(inputs, "base weights")
        with phase("forward"):
            out = flex_attention(*inputs, (tokens,), softcap=1.5, sinks=sinks)
        with phase("backward"):
            torch.autograd.grad(out, inputs, torch.empty_like(out))
    taken = {place: moment.breakdown.get("workspace") for (place, _), moment in ledger.peaks.items()}
    query, key, beside = inputs[0].nbytes, inputs[1].nbytes, 0 if sinks is None else 1
    numbers, tables = 16 * HEADS * tokens, flex.KINDS * 4 * (4 * 8 * 9 + tokens)
    assert taken["forward"] == query * (1 + beside) + numbers + tables
    beside_it = 3 * query + 2 * key  # the value, its gradient, and the results
    assert taken["backward"] == beside_it + query * (1 + 2 * beside) + numbers + tables


def test_a_plan_that_runs_on_real_tensors_computes_nothing(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", None)
    with planning_for("cuda"), PlanLedger("cuda", run=on_real_tensors):
        found = results(flex_attention, inputs_of(), softcap=1.5)
    assert [tensor.shape for tensor in found[1:]] == [tensor.shape for tensor in inputs_of()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by what torch imports
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_torch_s_compiler_takes_the_mask_and_the_cap_as_they_are_meant(softcap):
    """On a CPU it compiles values alone, without the logsumexp."""
    for lengths, window in ((LENGTHS, None), (LENGTHS, 140), ((700,), 40)):
        inputs = [tensor.detach() for tensor in inputs_of(lengths, dtype=torch.float32)]
        found, wanted = (attend(*inputs, lengths, 0.3, window, softcap) for attend in (flex_attention, block_attention))
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.real_card
@pytest.mark.parametrize(("softcap", "sinks"), [(1.5, None), (None, SINKS)], ids=str)
@pytest.mark.parametrize("window", [None, 140])
def test_on_a_gpu_values_and_gradients_are_those_of_float64(window, softcap, sinks):
    if not shapes.has_triton():
        pytest.skip("there is no Triton")
    how = {"window": window, "softcap": softcap, "sinks": None if sinks is None else sinks.cuda()}
    for lengths in (LENGTHS, (700,)):
        inputs = [t.detach().requires_grad_() for t in inputs_of(lengths, 2, torch.bfloat16, "cuda", 64)]
        found = results(flex_attention, inputs, lengths, **how)
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        for tensor, wanted in zip(found, results(block_attention, exact, lengths, **how), strict=True):
            assert (tensor - wanted).norm() <= 0.02 * wanted.norm()
