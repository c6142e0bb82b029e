"""A checkpointed block whose attention is kept gives what it gives without, and runs attention's kernels once."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.kernels.attention import row_attention
from qlora_lite.kernels.kept_attention import FUSED, kept_attention
from qlora_lite.memory.shapes import planning_for
from qlora_lite.offload.checkpoint import Checkpoint
from qlora_lite.offload.offload import HostStore

HEADS, DIM, ROWS = 4, 8, (9, 1, 14, 6)
TOKENS = sum(ROWS)
CPU = torch.device("cpu")


class Kernels(TorchDispatchMode):
    """Count the fused operators that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in FUSED
        return func(*args, **(kwargs or {}))


def inputs(key_heads=HEADS, length=TOKENS, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, DIM) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def block(query, key, value, attend):
    """Attention with more before and after it, so that a block's recomputation has something to do."""
    return attend(query.sin(), key * 2, value.cos()).tanh()


def run(attend, tensors, **settings):
    """Return the value and the gradients of a checkpointed block on a GPU's path, and how often its kernels ran."""
    with planning_for("cuda"), Kernels() as kernels:
        out = Checkpoint(**settings)(block, *tensors, attend)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, tensors, upstream)
    return [out.detach(), *grads], kernels.count


def rows_of(**settings):
    return lambda *tensors: row_attention(None, *tensors, None, **settings)[0]


def calls(window):
    """Return how often ROWS call a kernel: for their first chunks, for the whole ones behind, and for what is left."""
    return 4 + 2 + 3 if window == 4 else len(ROWS)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_rows_give_the_same_bits_and_are_attended_to_once(key_heads, window, dtype, on_host):
    attend = rows_of(row_lengths=ROWS, sliding_window=window, scaling=0.3)
    expected, twice = run(attend, inputs(key_heads, dtype=dtype))
    host = HostStore(CPU) if on_host else None
    found, once = run(attend, inputs(key_heads, dtype=dtype), keeps_attention=True, host=host)
    assert all(map(torch.equal, found, expected))
    assert (once, twice) == (calls(window), 2 * calls(window))


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_on_a_gpu_rows_give_the_same_bits_and_are_attended_to_once(key_heads, window, on_host):
    torch.use_deterministic_algorithms(True)
    try:
        card, attend = torch.device("cuda"), rows_of(row_lengths=ROWS, sliding_window=window)
        tensors = [t.detach().to(card).requires_grad_() for t in inputs(key_heads, dtype=torch.bfloat16)]
        expected, twice = run(attend, tensors)
        found, once = run(attend, tensors, keeps_attention=True, host=HostStore(card) if on_host else None)
        assert all(map(torch.equal, found, expected))
        assert (once, twice) == (calls(window), 2 * calls(window))
    finally:
        torch.use_deterministic_algorithms(False)


def test_several_sequences_and_a_mask_give_the_same_bits():
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].repeat(3, 1, 1, 1)
    mask[1, :, 2:, 0] = False
    for given in (None, mask, torch.zeros(mask.shape).masked_fill(~mask, -1e9)):
        attend = lambda *tensors, given=given: row_attention(None, *tensors, given)[0]  # noqa: E731
        expected, twice = run(attend, inputs(2, 7, 3))
        found, once = run(attend, inputs(2, 7, 3), keeps_attention=True)
        assert all(map(torch.equal, found, expected))
        assert (once, twice) == (1, 2)


@pytest.mark.parametrize("settings", [{"dropout": 0.4}, {"softcap": 1.5}, {"s_aux": torch.zeros(HEADS)}], ids=str)
def test_what_no_kernel_gives_and_what_is_random_is_recomputed(settings):
    saved = []
    attend = rows_of(row_lengths=ROWS, **settings)
    torch.manual_seed(0)
    expected, _ = run(attend, inputs())
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), planning_for("cuda"):
        Checkpoint(keeps_attention=True)(block, *inputs(), attend)
    assert len(saved) == 3
    torch.manual_seed(0)
    found, _ = run(attend, inputs(), keeps_attention=True)
    assert all(map(torch.equal, found, expected))


def test_dropout_is_left_to_the_kernels_that_draw_it_again(monkeypatch):
    """On a CPU no fused kernel has dropout, so that nothing else here would show it."""
    monkeypatch.setattr("qlora_lite.kernels.attention.kept_attention", None)
    run(rows_of(row_lengths=ROWS, dropout=0.4), inputs(), keeps_attention=True)


def test_the_result_and_one_number_for_each_token_and_head_are_kept_and_nothing_else():
    saved, tensors = [], inputs(2, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), planning_for("cuda"):
        Checkpoint(keeps_attention=True)(block, *tensors, rows_of(row_lengths=ROWS))
    assert all(one is other for one, other in zip(saved[:3], tensors, strict=True))
    kept = [(tensor.dtype, tensor.numel()) for tensor in saved[3:]]
    assert kept[::2] == [(torch.bfloat16, HEADS * length * DIM) for length in ROWS]
    assert kept[1::2] == [(torch.float32, HEADS * length) for length in ROWS]
    for output, logsumexp in zip(saved[3::2], saved[4::2], strict=True):
        assert output.untyped_storage().nbytes() == output.nbytes
        assert logsumexp.untyped_storage().nbytes() == logsumexp.nbytes


def formula_from(call, calls, *tensors):
    """Attend, from a number of calls on without a fused kernel."""
    calls.append(1)
    with sdpa_kernel(SDPBackend.MATH if len(calls) >= call else SDPBackend.FLASH_ATTENTION):
        return kept_attention(partial(scaled_dot_product_attention, is_causal=True), *tensors)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_kernel_that_only_one_of_the_runs_takes_changes_nothing_for_the_other_calls(call):
    def twice(calls, *tensors):
        once = formula_from(call, calls, *tensors)
        return formula_from(call, calls, once, *tensors[1:])

    expected, _ = run(partial(twice, []), inputs())
    found, _ = run(partial(twice, []), inputs(), keeps_attention=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_formula_s_scores_are_not_held_in_the_first_run():
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    with hooks, sdpa_kernel(SDPBackend.MATH), planning_for("cuda"):
        Checkpoint(keeps_attention=True)(block, *inputs(), rows_of(row_lengths=ROWS))
    assert len(saved) == 3


def test_on_a_cpu_the_kernels_that_give_its_blocks_their_values_are_not_kept_twice(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    attend = rows_of(row_lengths=ROWS)
    results = []
    for keeps in (False, True):
        tensors, saved = inputs(dtype=torch.bfloat16), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out = Checkpoint(keeps_attention=keeps)(block, *tensors, attend)
        assert len(saved) == 4
        results.append([out.detach(), *torch.autograd.grad(out.sum(), tensors)])
    assert all(map(torch.equal, *results))
