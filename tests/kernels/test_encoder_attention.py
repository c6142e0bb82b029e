"""An encoder's attention over packed sequences is that of float64 formulas for each sequence, gradients too."""

from types import SimpleNamespace

import pytest
import torch

from qlora_lite.kernels.attention import row_attention
from qlora_lite.kernels.encoder_attention import encoder_attention
from qlora_lite.memory.shapes import planning_for

LENGTHS = (40, 7, 32, 32, 33, 7, 1)  # two that need no padding follow one another


def inputs(dtype=torch.float32, filler=24):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS) + filler
    return [torch.randn(1, 3, tokens, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def written_out(query, key, value, window):
    outs, start = [], 0
    for length in LENGTHS:
        q, k, v = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        scores = q @ k.transpose(2, 3) / 8**0.5
        places = torch.arange(length)
        if window is not None:
            scores = scores.masked_fill((places[:, None] - places).abs() >= window, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(1, 2))
        start += length
    outs.append(query.new_zeros(1, query.shape[2] - start, 3, 8))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("filler", [0, 24])
def test_values_and_gradients_are_those_of_each_sequence_alone(window, filler):
    ours, exact = inputs(filler=filler), inputs(torch.float64, filler)
    for tensor in (*ours, *exact):
        tensor.requires_grad_()
    out, expected = encoder_attention(*ours, LENGTHS, window=window), written_out(*exact, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, ours, upstream)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_says_it_is_not_causal_attends_in_both_directions():
    query, key, value = inputs()
    encoder, decoder = SimpleNamespace(is_causal=False), SimpleNamespace(is_causal=True)
    both, _ = row_attention(encoder, query, key, value, None, row_lengths=LENGTHS)
    assert torch.equal(both, encoder_attention(query, key, value, LENGTHS))
    causal, _ = row_attention(decoder, query, key, value, None, row_lengths=LENGTHS)
    assert not torch.equal(both, causal)
    assert torch.equal(causal, row_attention(None, query, key, value, None, row_lengths=LENGTHS)[0])


def test_without_lengths_each_sequence_of_a_batch_is_one_row_and_a_mask_is_used():
    query, key, value = (tensor.expand(2, -1, -1, -1).contiguous() for tensor in inputs())
    layer, tokens = SimpleNamespace(is_causal=False), query.shape[2]
    out, _ = row_attention(layer, query, key, value, None)
    assert torch.equal(out[0], out[1])
    torch.testing.assert_close(out[:1], encoder_attention(query[:1], key[:1], value[:1], (tokens,)))
    mask = torch.zeros(2, 1, 1, tokens)
    mask[..., -30:] = -torch.inf
    cut, _ = row_attention(layer, query, key, value, mask)
    alone = encoder_attention(*(tensor[:1, :, : tokens - 30] for tensor in (query, key, value)), (tokens - 30,))
    torch.testing.assert_close(cut[:1, : tokens - 30], alone)


def test_a_gpu_s_plan_needs_no_mask_and_runs_on_tensors_without_memory():
    query, key, value = (tensor.to("meta") for tensor in inputs())
    with planning_for("cuda"):
        out = encoder_attention(query, key, value, LENGTHS)
    assert out.shape == (1, query.shape[2], 3, 8) and out.is_meta
