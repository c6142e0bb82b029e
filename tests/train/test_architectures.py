"""Every architecture trains exactly: 4-bit, packed, checkpointed and chunked equals plain float32 row by row."""

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    FURTHER,
    add_reference_lora,
    build_tiny,
    quantized_pair,
    random_batch,
    random_factors,
    reference_loss,
)
from tiny_trainer import SETTINGS

from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.errors import ModelError
from qlora_lite.kernels.attention import row_attention
from qlora_lite.models.load import use_row_attention, uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import CrossEntropy, TextSpec, causal_lm
from qlora_lite.train.forward import labelled_count, prepare
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import accumulate_gradients
from qlora_lite.train.text_guards import check_forward


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *FURTHER])
def test_loss_and_gradients_equal_those_of_plain_rows(model_type):
    model, plain = quantized_pair(model_type)
    add_lora(model, rank=3, alpha=6.0, dtype=torch.float32)
    random_factors(model)
    reference = add_reference_lora(plain, model)
    batch = random_batch()
    check_forward(model)
    set_memory_options(model, MemoryOptions())
    model.train()

    loss = accumulate_gradients(causal_lm(objective=CrossEntropy(4)), model, [prepare(batch, model.device)]).loss.item()
    expected = reference_loss(plain, batch) / labelled_count(batch)
    expected.backward()

    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, layer in lora_layers(model):
        for side in ("lora_A", "lora_B"):
            grad, wanted = getattr(layer, side).grad, getattr(reference[name], side).grad
            assert wanted.abs().max() > 0, f"{name}.{side}"
            assert (grad - wanted).norm() <= 2e-4 * wanted.norm(), f"{name}.{side}"


def test_blocks_that_read_keys_and_values_of_others_are_refused_in_a_plan_and_in_training():
    shared = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)
    model = build_tiny("gemma4_unified_text", **shared)
    workload = causal_lm(spec=TextSpec(model.config, "none"))
    with pytest.raises(ModelError, match="last 2 blocks read the keys and values of earlier ones"):
        workload.check_model(model, TrainSettings(**SETTINGS))
    with pytest.raises(ModelError, match="last 2 blocks read the keys"):
        workload.spec.planned_model(workload.method, torch.device("meta"), MemoryOptions(), BatchShape((8,), 7))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_forward_check_accepts_every_architecture(model_type):
    model, _ = quantized_pair(model_type)
    assert check_forward(model) < 1e-5


def test_the_forward_check_refuses_a_head_scaled_otherwise_than_its_configuration_says():
    model, _ = quantized_pair("cohere")
    model.config.logit_scale *= 1.1  # the model read it when it was built, the chunked loss reads it now
    with pytest.raises(ModelError, match="cannot be trained exactly"):
        check_forward(model)


def test_the_forward_check_runs_trains_unpacked_where_they_would_see_each_other(monkeypatch):
    model, _ = quantized_pair("llama")
    monkeypatch.setattr("qlora_lite.train.forward.uses_row_attention", lambda model: False)
    assert check_forward(model) < 1e-5
    assert runs_unpacked(model)


def test_the_forward_check_goes_back_to_the_model_s_own_attention_where_ours_leaves_something_out(monkeypatch):
    model = build_tiny("gpt_oss")
    use_row_attention(model)
    assert check_forward(model) < 1e-5 and not runs_unpacked(model)

    def without_sinks(*tensors, s_aux, **settings):
        return row_attention(*tensors, **settings)

    monkeypatch.setattr("qlora_lite.models.load.row_attention", without_sinks)
    use_row_attention(model)
    check_forward(model)
    assert runs_unpacked(model) and not uses_row_attention(model)
    monkeypatch.undo()
    use_row_attention(model)
