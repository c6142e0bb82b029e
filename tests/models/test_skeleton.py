"""Copies of models without values are what building them again would give."""

import pytest
import torch
from tiny import build_tiny
from transformers import Glm4Config, GlmConfig

from qlora_lite.models import skeleton
from qlora_lite.models.skeleton import meta_copy, meta_model

HOW = "nf4", True, torch.bfloat16


def tensors(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def forms(model):
    return [(name, type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors(model)]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def test_a_copy_is_like_a_new_model_and_has_tensors_of_its_own(model_type):
    config = build_tiny(model_type).config
    new, copies = meta_model(config, *HOW), [meta_copy(config, *HOW) for _ in range(2)]
    seen = set()
    for model in copies:
        assert forms(model) == forms(new)
        assert [(name, type(m)) for name, m in model.named_modules()] == [(n, type(m)) for n, m in new.named_modules()]
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (new.get_input_embeddings().weight is new.get_output_embeddings().weight)
        own = {tensor.untyped_storage()._cdata for _, tensor in tensors(model)}
        assert not own & seen
        seen |= own


def test_what_is_done_to_a_copy_is_not_done_to_the_next():
    config = build_tiny("llama").config
    model = meta_copy(config, *HOW)
    model.set_output_embeddings(None)
    assert meta_copy(config, *HOW).get_output_embeddings() is not None


def test_configurations_with_the_same_numbers_and_other_blocks_are_other_models():
    numbers = dict(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    names = [type(meta_copy(config(**numbers), *HOW)).__name__ for config in (GlmConfig, Glm4Config)]
    assert names == ["GlmForCausalLM", "Glm4ForCausalLM"]


def test_another_configuration_or_type_is_another_model_and_only_the_last_few_are_kept(monkeypatch):
    monkeypatch.setattr(skeleton, "MAX_BUILT", 2)
    monkeypatch.setattr(skeleton, "_built", {})
    config = build_tiny("llama").config
    for layers in (1, 2, 3, 2):
        config.num_hidden_layers = layers
        for dtype in (torch.bfloat16, torch.float32):
            model = meta_copy(config, "none", False, dtype)
            assert len(model.model.layers) == layers and model.lm_head.weight.dtype == dtype
            assert len(skeleton._built) <= 2
