"""Row attention equals eager float64 attention with a block-diagonal causal mask."""

import time

import pytest
import torch
from counted import counted
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.errors import ModelError
from qlora_lite.kernels import block_attention as block_attention_module
from qlora_lite.kernels.attention import _rows_operator, row_attention
from qlora_lite.kernels.block_attention import BLOCK_QUERIES, block_attention
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import CPU_MULTIPLE, planning_for
from qlora_lite.memory.work import WorkCounter

HEADS, DIM = 4, 8


def eager(query, key, value, rows, scaling=None, window=None, softcap=None, sinks=None):
    """Attend in float64 under one mask over the whole batch; query [B, H, T, D]."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    row = torch.cat([torch.full((length,), i, device=query.device) for i, length in enumerate(rows)])
    position = torch.arange(len(row), device=query.device)
    distance = position[:, None] - position[None, :]
    allowed = (row[:, None] == row[None, :]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : len(row)]
    return (weights @ value).transpose(1, 2)


def tensors(length, kv_heads=HEADS, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [3 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_each_row_attends_causally_to_itself_only(kv_heads, window, softcap):
    rows = (5, 1, 9, 2)
    q, k, v = (t.requires_grad_() for t in tensors(sum(rows), kv_heads))
    out, weights = row_attention(
        None, q, k, v, None, scaling=0.3, sliding_window=window, softcap=softcap, row_lengths=rows
    )
    expected = eager(q, k, v, rows, 0.3, window, softcap)
    assert weights is None
    assert out.shape == (1, sum(rows), HEADS, DIM)
    assert out.is_contiguous()
    assert torch.allclose(out.double(), expected, atol=5e-6)

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True):
        assert torch.allclose(grad, wanted.float(), atol=2e-5)


@pytest.mark.parametrize("special", [{"softcap": 1.5}, {"s_aux": torch.zeros(4)}])
def test_dropout_that_would_be_left_out_is_refused(special):
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(ModelError, match="set attention_dropout to 0"):
        row_attention(None, q, q, q, None, dropout=0.1, row_lengths=(6,), **special)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_default_scale_is_one_over_the_root_of_the_head_size(softcap):
    q, k, v = tensors(6)
    out, _ = row_attention(None, q, k, v, None, softcap=softcap, row_lengths=(6,))
    assert torch.allclose(out.double(), eager(q, k, v, (6,), softcap=softcap), atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_without_row_lengths_and_mask_every_sequence_is_one_row(window):
    q, k, v = tensors(7, batch=3)
    out, _ = row_attention(None, q, k, v, None, sliding_window=window)
    assert torch.allclose(out.double(), eager(q, k, v, (7,), window=window), atol=2e-6)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_mask_with_left_padding_gives_each_row_what_it_gets_alone(softcap, additive):
    q, k, v = tensors(8, 2, batch=2)
    padding = (0, 3)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    mask = torch.stack([causal & (torch.arange(8) >= pad) for pad in padding])[:, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out, _ = row_attention(None, q, k, v, mask, softcap=softcap)
    assert out.isfinite().all()
    for i, pad in enumerate(padding):
        alone = eager(q[i : i + 1, :, pad:], k[i : i + 1, :, pad:], v[i : i + 1, :, pad:], (8 - pad,), softcap=softcap)
        assert torch.allclose(out[i : i + 1, pad:].double(), alone, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_one_new_token_sees_the_whole_cache(softcap):
    q, k, v = tensors(9, 2)
    out, _ = row_attention(None, q[:, :, -1:], k, v, None, softcap=softcap)
    assert torch.allclose(out.double(), eager(q, k, v, (9,), softcap=softcap)[:, -1:], atol=2e-6)


def test_bf16_keeps_its_type():
    q, k, v = (tensor / 3 for tensor in tensors(9, dtype=torch.bfloat16))
    for softcap in (None, 2.0):
        out, _ = row_attention(None, q, k, v, None, softcap=softcap, row_lengths=(4, 5))
        assert out.dtype == torch.bfloat16
        assert torch.allclose(out.double(), eager(q, k, v, (4, 5), softcap=softcap), atol=0.02)


# --- blocks of queries, on a CPU -------------------------------------------------------------------------------

LONG_ROWS = (BLOCK_QUERIES + 45, 1, 33, 2 * BLOCK_QUERIES)


def values_and_gradients(function, inputs, upstream):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, None), (1.5, None), (None, torch.arange(-1.0, HEADS - 1))], ids=str
)
@pytest.mark.parametrize("window", [None, 1, 40, BLOCK_QUERIES + 10])
@pytest.mark.parametrize(("kv_heads", "batch"), [(4, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_of_several_blocks_equal_the_oracle(device, kv_heads, batch, window, softcap, sinks, monkeypatch):
    monkeypatch.setattr(block_attention_module, "few_of_many", lambda blocks, *_: blocks)  # this is no plan
    inputs = tensors(sum(LONG_ROWS), kv_heads, batch)
    upstream = torch.randn(batch, sum(LONG_ROWS), HEADS, DIM, generator=torch.Generator().manual_seed(1))
    how = 0.3, window, softcap, sinks
    with planning_for(device):
        found = values_and_gradients(lambda *t: block_attention(*t, LONG_ROWS, *how), inputs, upstream)
    expected = values_and_gradients(lambda *t: eager(*t, LONG_ROWS, *how), inputs, upstream)
    for tensor, wanted in zip(found, expected, strict=True):
        assert (tensor - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("size", [5, 12])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_heads_of_values_may_be_of_another_size(device, size):
    """DeepSeek-V3's are of 128, and its queries' of 192."""
    (query, key, _), rows = tensors(sum(LONG_ROWS)), torch.tensor(LONG_ROWS)
    value = torch.randn(*key.shape[:3], size, generator=torch.Generator().manual_seed(2))
    upstream = torch.randn(1, sum(LONG_ROWS), HEADS, size, generator=torch.Generator().manual_seed(1))
    with planning_for(device):
        found = values_and_gradients(lambda *t: block_attention(*t, LONG_ROWS, 0.3), (query, key, value), upstream)
    expected = values_and_gradients(lambda *t: eager(*t, LONG_ROWS, 0.3), (query, key, value), upstream)
    for tensor, wanted in zip(found, expected, strict=True):
        assert (tensor - wanted).norm() <= 1e-6 * wanted.norm()
    leaves = [t.to("meta", torch.bfloat16).requires_grad_() for t in (query, key, value)]
    with planning_for(device):
        planned = row_attention(None, *leaves, None, row_lengths=LONG_ROWS)[0]
        planned.sum().backward()
    assert planned.shape == found[0].shape and [t.grad.shape for t in leaves] == [t.shape for t in leaves]
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(_rows_operator, (query, key, value, rows, None, 0.3, None, None), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, None), (1.5, None), (None, torch.arange(-1.0, HEADS - 1))], ids=str
)
@pytest.mark.parametrize("window", [None, 40])
def test_on_a_gpu_windows_caps_and_sinks_equal_the_oracle(window, softcap, sinks, dtype, error):
    inputs = [tensor.cuda() / 3 for tensor in tensors(sum(LONG_ROWS), 2, dtype=dtype)]
    sinks = None if sinks is None else sinks.cuda()
    upstream = torch.randn(1, sum(LONG_ROWS), HEADS, DIM, device="cuda")
    found = values_and_gradients(
        lambda *t: row_attention(None, *t, None, 0.3, 0.0, window, softcap, sinks, LONG_ROWS)[0], inputs, upstream
    )
    expected = values_and_gradients(lambda *t: eager(*t, LONG_ROWS, 0.3, window, softcap, sinks), inputs, upstream)
    for tensor, wanted in zip(found, expected, strict=True):
        assert (tensor - wanted).norm() <= error * wanted.norm()


@pytest.mark.parametrize("window", [None, 3 * BLOCK_QUERIES])
@pytest.mark.parametrize(("device", "blocks"), [("cuda", 40), ("cpu", 90)])
def test_a_plan_counts_the_work_and_the_kernels_of_many_blocks_by_their_average(device, blocks, window, monkeypatch):
    length, works, peaks, calls = blocks * BLOCK_QUERIES + 20, [], [], []
    for all_of_them in (True, False):
        if all_of_them:
            monkeypatch.setattr(block_attention_module, "few_of_many", lambda blocks, *_: blocks)
        else:
            monkeypatch.undo()
        inputs = [torch.empty_like(t, device="meta").requires_grad_() for t in tensors(length, 2)]
        counter = WorkCounter()
        with planning_for(device), Ledger(work=counter) as ledger, phase("forward"):
            for _ in range(2):  # what a second block of the model needs is what the first one did
                start = time.perf_counter()
                out = block_attention(*inputs, (length,), 0.3, window, 1.5)
                out.backward(torch.empty_like(out))
                calls.append(time.perf_counter() - start)
        works.append(counter.work)
        peaks.append(ledger.peak.total)
    assert works[1].flops == pytest.approx(works[0].flops, rel=1e-3)
    assert peaks[1] == peaks[0]
    if device == "cpu":  # a few of the first blocks' products are too small to count
        assert works[0].compiled_products <= works[1].compiled_products <= 1.06 * works[0].compiled_products + 8
    assert 5 * min(calls[2:]) < min(calls[:2]), "a plan's time does not grow with the length"


def test_a_plan_s_kernels_do_not_depend_on_the_order_of_rows():
    inputs, counts = [torch.empty_like(t, device="meta") for t in tensors(105 * BLOCK_QUERIES, 2)], []
    for rows in ((65 * BLOCK_QUERIES, 40 * BLOCK_QUERIES), (40 * BLOCK_QUERIES, 65 * BLOCK_QUERIES)):
        with planning_for("cpu"), counted() as counter, phase("forward"):
            block_attention(*inputs, rows, 0.3)
        counts.append(counter.work.compiled_products)
    assert counts[0] == counts[1] >= 2 * 63


def test_a_plan_of_short_rows_for_a_cpu_runs_each_block_since_rows_share_kernels():
    inputs = [torch.empty_like(t, device="meta") for t in tensors(20 * BLOCK_QUERIES, 2)]
    counts = []
    for rows in ((10 * BLOCK_QUERIES,) * 2, (10 * BLOCK_QUERIES, 8 * BLOCK_QUERIES)):
        with planning_for("cpu"), counted() as counter, phase("forward"):
            block_attention(*inputs, rows, 0.3)
        counts.append(counter.work.compiled_products)
    assert counts[0] == counts[1] > 0


def test_the_error_in_bf16_is_below_that_of_eager_attention_in_bf16():
    """Measured: 0.74 to 0.86 of it, over values and gradients (the scale is applied before rounding)."""
    length = BLOCK_QUERIES + 100
    inputs = [t / 2 for t in tensors(length, 2, dtype=torch.bfloat16)]
    upstream = torch.randn(1, length, HEADS, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = values_and_gradients(lambda *t: eager(*t, (length,)), inputs, upstream.double())

    def plain(q, k, v):
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = (q @ k.transpose(2, 3) * DIM**-0.5).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
        return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)

    def errors(function):
        found = values_and_gradients(function, inputs, upstream)
        return [((t - wanted).norm() / wanted.norm()).item() for t, wanted in zip(found, expected, strict=True)]

    ours, theirs = errors(lambda *t: block_attention(*t, (length,))), errors(plain)
    assert max(mine / other for mine, other in zip(ours, theirs, strict=True)) < 1


def run_rows(rows, window, capabilities, monkeypatch):
    """Attend in bf16 on a CPU with such capabilities; return values, gradients, and whether a fused kernel ran."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    inputs = [t / 3 for t in tensors(sum(rows) + 7, 2, dtype=torch.bfloat16)]
    upstream = torch.randn(1, sum(rows) + 7, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    with Functions() as seen:
        found = values_and_gradients(
            lambda *t: row_attention(None, *t, None, sliding_window=window, row_lengths=rows)[0], inputs, upstream
        )
    wanted = values_and_gradients(lambda *t: eager(*t, (*rows, 7), None, window), inputs, upstream.double())
    return found, wanted, any("flash_attention" in name for name in seen.names)


class Functions(TorchDispatchMode):
    """Note the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [LONG_ROWS, (5,), (33, 2)])
def test_a_fused_kernel_gives_the_values_where_a_matrix_unit_makes_it_faster(rows, monkeypatch):
    (out, *grads), (expected, *_), fused = run_rows(rows, None, {"amx_bf16": True}, monkeypatch)
    assert fused
    tokens = sum(rows)
    assert (out[:, :tokens] - expected[:, :tokens]).norm() <= 4e-3 * expected[:, :tokens].norm()
    assert not out[:, tokens:].any()
    (_, *same), _, fused = run_rows(rows, None, {}, monkeypatch)
    assert not fused
    assert all(map(torch.equal, grads, same))


@pytest.mark.parametrize(("window", "fused"), [(None, True), (BLOCK_QUERIES + 45, True), (BLOCK_QUERIES, False)])
def test_a_window_that_cuts_a_row_is_left_to_the_blocks(window, fused, monkeypatch):
    assert run_rows((BLOCK_QUERIES + 45, 3), window, {"amx_bf16": True}, monkeypatch)[2] == fused


def test_filler_behind_the_rows_gets_zeros_and_gives_no_gradient():
    inputs = [t.requires_grad_() for t in tensors(40)]
    out = block_attention(*inputs, (9, 20))
    assert not out[:, 29:].any()
    out.sum().backward()
    assert all(not t.grad[:, :, 29:].any() and t.grad[:, :, :29].any() for t in inputs)


class LargestResult(TorchDispatchMode):
    """Note the most numbers that a result holds."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_only_the_inputs_are_saved_and_no_more_than_one_block_of_weights_exists():
    length, saved = 4 * BLOCK_QUERIES, []
    inputs = [t.requires_grad_() for t in tensors(length, 2)]
    with LargestResult() as seen:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            out = block_attention(*inputs, (length,))
        out.sum().backward()
    padded = (length + CPU_MULTIPLE) * DIM
    assert sorted(saved) == [2 * padded, 2 * padded, HEADS * padded]
    assert seen.most == HEADS * BLOCK_QUERIES * length
