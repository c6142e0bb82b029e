"""Rows trained together give the loss and gradients of a float64 model that sees each row alone, in every family."""

import copy
import logging

import pytest
import torch
from tiny import ARCHITECTURES, UNUSUAL, add_reference_lora, build_tiny, random_batch, random_factors, reference_loss

from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.models.load import adopt, use_row_attention, uses_row_attention
from qlora_lite.models.packing import runs_unpacked, why_unpacked
from qlora_lite.models.skeleton import meta_model
from qlora_lite.train.causal_lm import CrossEntropy, causal_lm
from qlora_lite.train.forward import labelled_count, prepare
from qlora_lite.train.step import accumulate_gradients
from qlora_lite.train.text_guards import check_forward

# Families in which packed rows see each other: distances counted over the whole sequence, a state or a
# convolution that runs on, an attention of their own that takes no rows. GPT-Neo cannot compute more tokens than a row.
RUN_ALONE = {"bloom", "mpt", "nemotron", "mamba", "mamba2", "recurrent_gemma", "qwen3_next", "lfm2", "gpt_neo"}
EITHER = {"falcon", "falcon_alibi"}  # their own attention takes rows in transformers 5.24, not in 5.17


@pytest.mark.parametrize("name", ["bloom", "mpt", "nemotron"])
def test_a_model_that_is_said_to_see_the_sequence_before_does_so(name, monkeypatch):
    monkeypatch.setattr("qlora_lite.train.text_guards.why_unpacked", lambda *_: "")
    model = adopt(build_tiny(name))
    check_forward(model)
    assert runs_unpacked(model), "it does not any more: take it out of why_unpacked"


@pytest.mark.filterwarnings("ignore")  # what architectures say about missing kernels and about each other
@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNUSUAL])
def test_packed_rows_have_the_loss_and_gradients_of_each_row_alone(name):
    model = build_tiny(name)
    oracle = copy.deepcopy(model).double()
    oracle.set_attn_implementation("eager")
    if hasattr(oracle, "set_experts_implementation"):
        oracle.set_experts_implementation("eager")
    use_row_attention(model)
    check_forward(model)
    skeleton = meta_model(model.config, "nf4", True, torch.float32)
    assert name in EITHER or bool(why_unpacked(skeleton, 99)) == runs_unpacked(model) == (name in RUN_ALONE)
    add_lora(model, "all-linear", rank=3, alpha=6.0, dtype=torch.float32)
    random_factors(model)
    reference = add_reference_lora(oracle, model)
    oracle.double()
    batch = random_batch()

    loss = accumulate_gradients(
        causal_lm(objective=CrossEntropy(4)), model.train(), [prepare(batch, model.device)]
    ).loss.item()
    expected = reference_loss(oracle.train(), batch) / labelled_count(batch)
    expected.backward()

    assert loss == pytest.approx(expected.item(), rel=1e-5)
    error = 2e-4 if name == "qwen3_next" else 1e-4  # triangular systems, in float32
    for layer_name, layer in lora_layers(model):
        for side in ("lora_A", "lora_B"):
            grad, wanted = getattr(layer, side).grad.double(), getattr(reference[layer_name], side).grad
            assert wanted.abs().max() > 0, f"{layer_name}.{side}"
            assert (grad - wanted).norm() <= error * wanted.norm(), f"{layer_name}.{side}"


def test_a_model_whose_rows_run_alone_says_so_once(caplog):
    model = build_tiny("lfm2")
    use_row_attention(model)
    with caplog.at_level(logging.WARNING, "qlora_lite"):
        check_forward(model)
        check_forward(model)
    (line,) = (record.message for record in caplog.records if record.name == "qlora_lite")
    assert "a convolution would reach into the one before" in line and "packing saves no time" in line
    assert uses_row_attention(model)
