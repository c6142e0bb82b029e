"""Attention in a window, cut into chunks, equals eager float64 attention under one mask; its memory follows the row."""

from functools import partial

import pytest
import torch
from test_attention import DIM, HEADS, eager, tensors, values_and_gradients

from qlora_lite.kernels.attention import _fused, row_attention, window_attention, window_mask
from qlora_lite.memory.ledger import Ledger
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for


@pytest.mark.parametrize("length", [4, 5, 8, 9, 12, 15])
@pytest.mark.parametrize("window", [1, 4, 7, None])
@pytest.mark.parametrize(("kv_heads", "batch"), [(HEADS, 1), (2, 3)])
def test_chunks_of_a_row_equal_one_mask_over_it(kv_heads, batch, window, length):
    inputs = tensors(length, kv_heads, batch, torch.float64)
    upstream = torch.randn(batch, length, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    attend = partial(_fused, scaling=0.3, dropout=0.0)
    found = values_and_gradients(lambda *row: window_attention(attend, *row, window), inputs, upstream)
    expected = values_and_gradients(lambda *row: eager(*row, (length,), 0.3, window), inputs, upstream)
    for tensor, wanted in zip(found, expected, strict=True):
        assert (tensor - wanted).norm() <= 1e-12 * wanted.norm().clamp(min=1)  # of one key, gradients are 0


@pytest.mark.parametrize(("queries", "window"), [(1, 1), (5, 5), (3, 17)])
def test_a_mask_shows_each_query_as_many_keys_as_the_window_has(queries, window):
    query = torch.empty(0, dtype=torch.bfloat16)
    seen = window_mask(queries, window, query)
    for number, row in enumerate(seen):
        assert row.nonzero().flatten().tolist() == list(range(number + 1, number + window + 1))
    with planning_for("cuda"):
        mask = window_mask(queries, window, query)
    assert mask.dtype == query.dtype and mask.stride(0) % 16 == 0  # as a GPU's kernel wants it
    assert torch.equal(mask == 0, seen) and torch.equal(mask == -torch.inf, ~seen)


@pytest.mark.parametrize(
    "settings", [{"sliding_window": 128}, {"softcap": 1.5}, {"s_aux": torch.zeros(4, device="meta")}], ids=str
)
def test_what_a_gpu_needs_grows_with_the_row_and_not_with_its_square(settings):
    peaks = []
    for length in (2048, 4096):
        inputs = [torch.empty(1, heads, length, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with planning_for("cuda"), Ledger() as ledger:
            out = row_attention(None, *inputs, None, row_lengths=(length,), **settings)[0]
            with phase("backward"):
                out.backward(torch.empty_like(out))
        peaks.append(max(moment.total for moment in ledger.peaks.values()))
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.05)
