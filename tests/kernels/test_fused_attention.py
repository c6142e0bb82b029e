"""A GPU's fused kernels of attention get what they take, and a plan what they need."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from qlora_lite.kernels import fused_attention
from qlora_lite.kernels.attention import row_attention
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.planning.plan_ledger import GPU_SCRATCH, PlanLedger
from qlora_lite.train.determinism import deterministic

FLASH, EFFICIENT, MATH = fused_attention.KERNELS
HEADS, SIZE, LENGTH = 8, 80, 300
ROWS, NUMBERS = 384, 96  # what a kernel makes of the length and the size of a head
WIDE = 256  # a size of a head beyond the memory-efficient kernel's tile
COPY = 2 * HEADS * LENGTH * SIZE  # bytes of something as large as the queries, bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
def test_a_gpu_s_kernels_get_grouped_heads_only_where_flash_attention_takes_the_call(window, dtype, monkeypatch):
    """Another would leave it to the formula, with the scores of all heads in memory."""
    seen, attend = [], fused_attention.scaled_dot_product_attention

    def watched(query, key, value, mask, *rest, enable_gqa, **options):
        seen.append((mask is not None, enable_gqa, query.shape[1] != key.shape[1]))
        return attend(query, key, value, mask, *rest, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(fused_attention, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(1, heads, 12, 8, dtype=dtype) for heads in (4, 2, 2))
    expected = row_attention(None, q, k, v, None, row_lengths=(12,), sliding_window=window)[0]
    seen.clear()
    with planning_for("cuda"):
        found = row_attention(None, q, k, v, None, row_lengths=(12,), sliding_window=window)[0]
    assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()
    grouped = dtype == torch.bfloat16
    masked = 0 if window is None else 2  # calls: the whole chunk behind the first, and the rest of the row
    assert seen == [(False, grouped, grouped)] + [(True, False, False)] * masked


@pytest.mark.parametrize("mask", ["padding", None])
def test_a_token_s_query_of_grouped_heads_copies_no_keys(mask):
    q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((8, 1), (2, 200), (2, 200)))
    hidden = torch.zeros(2, 1, 1, 200, dtype=torch.bool)
    hidden[1, ..., :150] = True
    seen = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf) if mask else None
    scores = (q @ k.repeat_interleave(4, 1).transpose(2, 3) / 4).masked_fill(
        hidden if mask else torch.tensor(False), -torch.inf
    )
    expected = scores.softmax(-1) @ v.repeat_interleave(4, 1)
    with planning_for("cuda"), Ledger() as ledger:
        found = fused_attention.fused_attention(q, k, v, seen, None)
    assert found.shape == q.shape and torch.allclose(found, expected, atol=1e-5)
    assert ledger.peak.total < k.nbytes / 2


@pytest.mark.parametrize(
    ("size", "value_size", "dropout", "grouped"),
    [
        (128, 128, 0, True),
        (128, 128, 0.1, True),
        (256, 256, 0, True),
        (256, 256, 0.1, False),
        (512, 512, 0, False),
        (208, 208, 0, False),
        (128, 64, 0, False),
    ],
)
def test_heads_of_a_size_that_flash_attention_does_not_take_are_not_grouped(size, value_size, dropout, grouped):
    """Gemma 4's have 512: grouped, the formula would hold the scores of all heads, and a plan would not."""
    shapes = (1, 8, 5, size), (1, 2, 5, size), (1, 2, 5, value_size)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    called = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is fused_attention.scaled_dot_product_attention:
                called.append((options["enable_gqa"], arguments[1].shape[1]))
            return function(*arguments, **options or {})

    with planning_for("cuda"), Watching():
        fused_attention.fused_attention(query, key, value, None, None, dropout)
    assert called == [(grouped, 2 if grouped else 8)]


@pytest.mark.parametrize(
    ("size", "dtype", "taken"),
    [
        (128, torch.bfloat16, True),
        (512, torch.bfloat16, False),
        (128, torch.float16, False),
    ],
)
def test_a_plan_counts_the_kernel_that_takes_the_heads(size, dtype, taken, counted_kernels):
    inputs = laid_out(2, LENGTH, size, dtype, False, "meta")
    with planning_for("cuda"), PlanLedger("cuda"):
        out = fused_attention.fused_attention(*inputs, None, None)
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert counted_kernels == [(HEADS // 2 if taken else 1, taken)]


@pytest.fixture
def counted_kernels(monkeypatch):
    """Give the groups of heads of each backward that a plan counts, and whether it is flash attention's."""
    seen = []

    def scratch_bytes(grad, query, key, *others, **options):
        found = fused_attention.scratch_bytes(grad, query, key, *others, **options)
        seen.append((query.shape[1] // key.shape[1], found != fused_attention._efficient_bytes(query, key)))
        return found

    monkeypatch.setitem(GPU_SCRATCH, fused_attention.BACKWARDS[0], scratch_bytes)
    return seen


def card_with(monkeypatch, grouped, alone, masked):
    """Have a GPU whose torch takes these kernels: for grouped heads, for others, and for others with a mask."""

    def chosen(_device, _dtype, heads, key_heads, _size, _value_size, is_masked, _dropout):
        return (masked if is_masked else alone if heads == key_heads else grouped).value

    monkeypatch.setattr(fused_attention, "_chosen", chosen)


def planned_peak(length, window=None):
    inputs = laid_out(2, length, SIZE, torch.bfloat16, False, "meta")
    with planning_for("cuda"), PlanLedger("cuda", allocation_bytes=1) as ledger:
        ledger.claim(inputs, "saved activations")
        out = row_attention(None, *inputs, None, row_lengths=(length,), sliding_window=window)[0]
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return max(moment.total for moment in ledger.peaks.values())


@pytest.mark.parametrize("window", [None, 512])
def test_on_a_gpu_without_a_fused_kernel_a_plan_of_attention_is_linear_in_the_length(window, monkeypatch):
    lengths = 2048, 4096, 8192
    card_with(monkeypatch, MATH, MATH, MATH)
    monkeypatch.setattr(fused_attention, "_PLANNED", None)  # what a plan takes for a fused kernel
    short, middle, long = (planned_peak(length, window) for length in lengths)
    assert long - middle < 2.2 * (middle - short)
    assert long < HEADS * 8192**2  # half of all scores, once


def test_on_a_gpu_without_a_fused_kernel_blocks_attend_as_the_formula_does(monkeypatch):
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 400, 16, requires_grad=True) for heads in (8, 2, 2)]
    grad, found = torch.randn(1, 400, 8, 16), []
    for kernels in (None, MATH):
        if kernels:
            card_with(monkeypatch, MATH, MATH, MATH)
            monkeypatch.setattr(fused_attention, "scaled_dot_product_attention", None)  # nothing may call it
        with planning_for("cuda"):
            out = row_attention(None, *inputs, None, row_lengths=(300, 100))[0]
        found.append([out, *torch.autograd.grad(out, inputs, grad)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()


def test_where_torch_has_no_flash_attention_heads_are_not_grouped_and_another_kernel_is_planned(
    counted_kernels, monkeypatch
):
    for kernels in ((FLASH, FLASH, EFFICIENT), (MATH, EFFICIENT, EFFICIENT)):
        card_with(monkeypatch, *kernels)
        planned_peak(LENGTH)
        assert fused_attention.kernel_of_gpu(torch.bfloat16) == (
            "flash attention" if kernels[0] is FLASH else "memory-efficient attention"
        )
    assert counted_kernels == [(HEADS // 2, True), (1, False)]
    card_with(monkeypatch, MATH, MATH, MATH)
    assert "no fused kernel" in fused_attention.kernel_of_gpu(torch.bfloat16)


def test_in_float16_a_gpu_is_not_left_to_choose_flash_attention(monkeypatch):
    """A plan for GPUs without it, and a try of that plan on one that has it, are of the same kernel."""
    allowed = []
    monkeypatch.setattr(fused_attention, "sdpa_kernel", lambda kernels: allowed.append(kernels) or nullcontext())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = laid_out(HEADS, 5, 16, dtype, False, "cpu")
        fused_attention.fused_attention(*inputs, None, None)
    assert [SDPBackend.FLASH_ATTENTION in kernels for kernels in allowed] == [False, True]
    assert all(SDPBackend.EFFICIENT_ATTENTION in kernels for kernels in allowed)


@pytest.fixture
def planned_inside(monkeypatch):
    """Return by how many bytes a kernel's own memory raises the most that a planned backward needs."""

    def peak(key_heads, dtype, repeatable, heads_first=False, mask=None):
        inputs = laid_out(key_heads, LENGTH, SIZE if mask is None else WIDE, dtype, heads_first, "meta")
        with planning_for("cuda"), deterministic(repeatable), PlanLedger("cuda", allocation_bytes=1) as ledger:
            ledger.claim(inputs, "saved activations")
            out = fused_attention.fused_attention(*inputs, mask, None)
            with phase("backward"):
                torch.autograd.grad(out, inputs, torch.empty_like(out))
        return max(moment.total for moment in ledger.peaks.values() if moment.phase == "backward")

    def inside(*settings):
        with monkeypatch.context() as patch:
            for operator in fused_attention.BACKWARDS:
                patch.setitem(GPU_SCRATCH, operator, lambda *_, **__: 0)
            without = peak(*settings)
        return peak(*settings) - without

    return inside


def laid_out(key_heads, length, size, dtype, heads_first, device):
    """Return query, key and value [1, H, T, D]; in memory T lies before H, as a model has it, or behind."""
    torch.manual_seed(0)
    found = []
    for heads in (HEADS, key_heads, key_heads):
        shape = (1, heads, length, size) if heads_first else (1, length, heads, size)
        tensor = torch.randn(shape, device=device).to(dtype)
        found.append((tensor if heads_first else tensor.transpose(1, 2)).requires_grad_())
    return found


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("repeatable", "sums"), [(False, 1), (True, 24)])  # 188 processors for 8 heads
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_a_plan_counts_what_flash_attention_s_backward_takes_inside(
    planned_inside, key_heads, repeatable, sums, heads_first
):
    expected = 4 * HEADS * ROWS + 4 * sums * HEADS * ROWS * NUMBERS  # a number and a row of float32 a token and head
    if key_heads != HEADS:
        expected += 2 * COPY  # bfloat16 gradients of key and value for each head of the query
    if heads_first:
        expected += 2 * COPY  # the results, which lie as the queries do, and their gradients
    assert planned_inside(key_heads, torch.bfloat16, repeatable, heads_first) == expected


def test_in_float32_the_query_s_gradient_is_summed_up_beside_the_result(planned_inside):
    assert planned_inside(HEADS, torch.float32, False) == 4 * HEADS * ROWS * (
        1 + 128
    )  # another kernel: 80 is rounded up


def test_in_float16_heads_wider_than_the_smaller_tile_have_sums_of_pieces_too(planned_inside):
    numbers = ROWS * (1 + 128) + 2 * 64 * 5 * 128  # of 80, rounded up
    assert planned_inside(HEADS, torch.float16, False) == 4 * HEADS * numbers


# of 64 keys: 5 for 300, and for all 8 heads
@pytest.mark.parametrize(("at_once", "pieces"), [(200, 5), (16, 2), (4, 1)])
def test_with_a_mask_and_wide_heads_pieces_of_the_keys_have_sums_too(planned_inside, at_once, pieces, monkeypatch):
    monkeypatch.setattr(fused_attention, "_PIECES_AT_ONCE", at_once)
    mask = torch.empty(LENGTH, LENGTH, dtype=torch.bool, device="meta")
    numbers = ROWS * (1 + WIDE) + 2 * 64 * pieces * WIDE
    assert planned_inside(HEADS, torch.bfloat16, False, False, mask) == 4 * HEADS * numbers


def on_cpu(query, key, value, *rest, scale):
    """A GPU's operator of flash attention, computed by a CPU's."""
    out, logsumexp = fused_attention._PLANNED(query, key, value, *rest, scale=scale)
    return out, logsumexp, None, None, 0, 0, torch.zeros(2), torch.zeros(()), torch.empty(0)


def backward_on_cpu(*args, scale):
    (*inputs, _, _, _, _, dropout, causal, _, _) = args
    return fused_attention._PLANNED_BACKWARD(*inputs, dropout, causal, scale=scale)


@pytest.mark.parametrize(
    ("key_heads", "most", "calls"),
    [
        (8, 2**30, 0),
        (8, 1, 8),
        (4, 1, 4),
        (4, 130_000, 2),
        (4, 100_000, 4),
        (1, 1, 0),
    ],
)
def test_a_backward_over_few_heads_at_a_time_gives_the_same_bits(key_heads, most, calls, monkeypatch):
    seen = []

    def backward(*args, **options):
        seen.append(args[1].shape[1])
        return backward_on_cpu(*args, **options)

    monkeypatch.setattr(fused_attention, "_FLASH", on_cpu)
    monkeypatch.setattr(fused_attention, "_FLASH_BACKWARD", backward)
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", most)
    inputs = [torch.randn(1, heads, 60, 32).bfloat16().requires_grad_() for heads in (HEADS, key_heads, key_heads)]
    grads = []
    for whole in (True, False):
        if whole:
            out = fused_attention._PLANNED(*inputs, 0.0, True, scale=0.3)[0]
        else:
            with planning_for("cuda"):
                out = fused_attention.fused_attention(*inputs, None, 0.3)
        grads.append([out, *torch.autograd.grad(out, inputs, torch.arange(32.0).bfloat16().expand(out.shape))])
    assert all(map(torch.equal, *grads))
    assert seen == [HEADS // calls] * calls if calls else not seen


def test_few_heads_go_back_from_what_the_first_run_of_a_block_kept(monkeypatch):
    monkeypatch.setattr(fused_attention, "_FLASH", on_cpu)
    monkeypatch.setattr(fused_attention, "_FLASH_BACKWARD", backward_on_cpu)
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", 1)
    found = []
    for keeps_attention in (False, True):
        torch.manual_seed(0)
        inputs = [torch.randn(1, heads, 60, 32).bfloat16().requires_grad_() for heads in (HEADS, 2, 2)]
        with planning_for("cuda"):
            block = lambda *tensors: row_attention(None, *tensors, None, row_lengths=(40, 20))[0]  # noqa: E731
            out = Checkpoint(keeps_attention=keeps_attention)(block, *inputs)
            found.append(torch.autograd.grad(out, inputs, torch.randn(out.shape).bfloat16()))
    assert all(map(torch.equal, *found))


def test_a_repeatable_backward_is_not_cut_since_fewer_heads_have_more_sums(planned_inside, monkeypatch):
    whole = planned_inside(2, torch.bfloat16, True)
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", 1)
    assert planned_inside(2, torch.bfloat16, True) == whole


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_a_plan_of_a_backward_over_few_heads_counts_their_share(planned_inside, key_heads, monkeypatch):
    whole = planned_inside(key_heads, torch.bfloat16, False)
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", 1)
    copied = 2 * COPY  # a few heads of the results and their gradients lie apart from one another
    assert planned_inside(key_heads, torch.bfloat16, False) == (whole + copied) // key_heads


@pytest.mark.gpu
@pytest.mark.parametrize("most", [2**40, 1])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    ("key_heads", "dtype", "size", "masked"),
    [
        (HEADS, torch.bfloat16, 64, False),
        (2, torch.bfloat16, 64, False),
        (2, torch.bfloat16, 128, False),
        (2, torch.float32, 64, False),
        (HEADS, torch.bfloat16, 64, True),
        (1, torch.bfloat16, WIDE, True),
    ],
)
def test_on_a_gpu_a_backward_takes_what_plans_count(key_heads, dtype, size, masked, heads_first, most, monkeypatch):
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", most)
    taken = {}
    for device in ("meta", "cuda"):
        mask = torch.ones(2048, 2048, dtype=torch.bool, device=device).tril() if masked else None
        planning, ledger = nullcontext(), Ledger(allocation_bytes=512)
        if device == "meta":
            planning, ledger = planning_for("cuda"), PlanLedger("cuda")
        with planning, ledger:
            inputs = laid_out(key_heads, 2048, size, dtype, heads_first, device)
            out = fused_attention.fused_attention(*inputs, mask, None)
            upstream = out.new_ones(1, 2048, HEADS, size).transpose(1, 2)
            gc.collect()  # of the tests before, whose memory would otherwise go in between
            start = ledger.now().total if device == "meta" else torch.cuda.memory_allocated()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with phase("backward"):
                torch.autograd.grad(out, inputs, upstream)
        peak = max(moment.total for moment in ledger.peaks.values() if moment.phase == "backward")
        taken[device] = (peak if device == "meta" else torch.cuda.max_memory_allocated()) - start
    assert taken["meta"] == pytest.approx(taken["cuda"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.real_card
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_on_a_gpu_a_backward_over_few_heads_gives_the_same(key_heads, monkeypatch):
    found = []
    for most in (2**40, 1):
        monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", most)
        inputs = laid_out(key_heads, 8192, 64, torch.bfloat16, False, "cuda")
        out = fused_attention.fused_attention(*inputs, None, None)
        found.append(torch.autograd.grad(out, inputs, torch.ones_like(out)))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


def test_a_module_that_raises_leaves_torchs_attention_as_it_was():
    """Planned attention is causal: left behind, every encoder of the process would be."""

    class Raises(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("values are needed")

    module = Raises()
    fused_attention.PlannedKernels().during(module)
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    before = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with pytest.raises(RuntimeError, match="values are needed"):
        module(query)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, key, value), before)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_plan_s_rms_norm_holds_what_the_device_s_kernel_does(device_type):
    module = torch.nn.RMSNorm(64).to("meta", torch.bfloat16).requires_grad_(False)
    fused_attention.PlannedKernels().during(module)
    x = torch.empty(32, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with planning_for(device_type), Ledger() as ledger:
        y = module(x * 1)
        held = ledger.live_bytes
        y.backward(torch.empty_like(y))
    rstd = 4 * 32
    assert (held == 2 * x.nbytes + rstd) == (device_type == "cuda") and x.grad.shape == x.shape
