"""Rows of single tokens that are trained: the loss's gradient, files of the real peft both ways, longer tables."""

import peft
import pytest
import torch
from test_parts import CPU, IDS, logits, moved
from tiny import add_reference_lora, build_tiny, quantized_pair, random_batch
from tiny_files import MERGES, save_tiny
from tiny_trainer import SETTINGS, examples
from torch.nn import functional

from qlora_lite.adapters.files import Lora, attach_adapter, detach_adapter, load_adapter, save_adapter, weights_before
from qlora_lite.adapters.lora.inject import Target
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.parts import EMBEDDINGS, _first_rows, trained_weights
from qlora_lite.adapters.read import read_adapter
from qlora_lite.errors import ModelError
from qlora_lite.kernels.token_rows import RowsOver
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.loop import Trainer
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.state import STATE, capture, restore

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
]
TOKENS, NEW = (4, 90, 131), (7, 160, 161)  # the tiny models have 160
MODELS = ["llama", "gemma2"]  # with a head of its own; tied, its embeddings scaled and its logits capped


def method(tokens=TOKENS, known=160, **options):
    return Lora((Target("q_proj"),), 3, 6.0, dtype=torch.float32, tokens=tokens, known_tokens=known, **options)


def adapted(model_type, tokens=TOKENS):
    model = build_tiny(model_type)
    method(tokens).apply(model)
    return moved(model)


def longer(model_type, size=162):
    """A base with a longer table, as peft's users make it."""
    model = build_tiny(model_type)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


def test_rows_take_the_place_of_the_table_s():
    table, rows = torch.randn(10, 4), torch.randn(3, 4)
    over, whole = RowsOver(table, (2, 7, 11), rows), torch.zeros(12, 4)
    whole[:10] = table
    whole[[2, 7, 11]] = rows
    numbers = torch.tensor([0, 2, 11, 7, 9, 2])
    assert torch.equal(over[numbers], whole[numbers])
    for some in (slice(0, 12), slice(0, 2), slice(2, 9), slice(8, 12), slice(11, 12), slice(3, 7)):
        assert torch.equal(over[some], whole[some])


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("tokens", [TOKENS, NEW])
def test_gradients_are_those_of_rows_in_the_whole_table(model_type, tokens):
    ours, theirs = quantized_pair(model_type)
    work = causal_lm(method=method(tokens))
    work.method.apply(ours)
    moved(ours)
    theirs.resize_token_embeddings(162, mean_resizing=False)
    add_reference_lora(theirs, ours)
    batch = random_batch()
    batch.input_ids[0, ::3] = torch.tensor(tokens)[torch.arange(len(batch.input_ids[0, ::3])) % 3]
    batch.labels[3] = tokens[-1]
    tables = {"model.embed_tokens": theirs.get_input_embeddings(), "lm_head": theirs.get_output_embeddings()}
    rows = {name: p for name, p in trained_weights(ours)}
    for name, table in tables.items():
        own = rows.get(f"{name}.token_rows", rows["model.embed_tokens.token_rows"])
        table.weight.requires_grad_(False)[list(tokens)] = own.detach()
        table.weight.requires_grad_()
    size = max(160, tokens[-1] + 1)
    total, start = 0.0, 0
    for length in batch.row_lengths:
        part = slice(start, start + length)
        found = theirs(input_ids=batch.input_ids[:, part], use_cache=False).logits[0, :, :size]
        total = total + functional.cross_entropy(found, batch.labels[part], ignore_index=-100, reduction="sum")
        start += length
    total.backward()
    work.check_model(ours, TrainSettings(**SETTINGS))
    loss = work.loss(ours.train(), work.batches.inputs(batch, CPU)).sum
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    loss.backward()
    for name, parameter in rows.items():
        expected = tables[name.removesuffix(".token_rows")].weight.grad[list(tokens)]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("tokens", [TOKENS, NEW])
def test_a_saved_adapter_gives_the_same_logits_in_peft_and_comes_back_from_it(model_type, tokens, tmp_path):
    ours, ids = adapted(model_type, tokens), IDS.clone()
    ids[:, ::2] = tokens[-1]
    save_adapter(ours, tmp_path / "ours")
    base = longer(model_type) if tokens == NEW else build_tiny(model_type)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert torch.allclose(logits(theirs, ids), logits(ours, ids), atol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(build_tiny(model_type), tmp_path / "theirs")
    assert torch.equal(logits(again, ids), logits(ours, ids))


@pytest.mark.parametrize("model_type", MODELS)
def test_an_adapter_trained_by_peft_gives_the_same_logits_here(model_type, tmp_path):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, trainable_token_indices=[90, 4, 131]
    )
    theirs = peft.get_peft_model(build_tiny(model_type), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    ids = IDS.clone()
    ids[:, ::2] = 131
    for _ in range(2):  # after one step only B has moved
        theirs.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_adapter(build_tiny(model_type), tmp_path), ids), logits(theirs, ids), atol=2e-4)


def test_new_tokens_begin_as_the_mean_of_those_that_are_known():
    model = build_tiny("llama")
    tables = {"model.embed_tokens": model.get_input_embeddings().weight, "lm_head": model.lm_head.weight}
    method((7, 150, 160), known=140).apply(model)
    for name, table in tables.items():
        rows = model.get_parameter(f"{name}.token_rows")
        assert torch.equal(rows[0], table[7])
        assert torch.allclose(rows[1], table[:140].mean(0)) and torch.equal(rows[1], rows[2])


def new_trainer(optimizer="adamw_8bit", model_type="gemma2"):
    model, how = quantized_pair(model_type, dtype=torch.bfloat16)[0], method(NEW)
    torch.manual_seed(0)
    how.apply(model)
    rows = examples()
    for row in rows:
        row.token_ids[1::3] = 161
    found = Trainer(model, rows, TrainSettings(**(SETTINGS | {"optimizer": optimizer})), workload=causal_lm(method=how))
    found.check()
    return found


def test_a_token_that_the_tokenizer_has_stays_what_it_is_and_may_lie_behind_the_table(tmp_path):
    save_tiny(tmp_path / "model", merges=MERGES)
    plain = load_tokenizer(tmp_path / "model")
    own = load_tokenizer(tmp_path / "model", tokens=["th", plain.eos_token, "<new>"])
    text = f"the thing{plain.eos_token}"
    assert own(text).input_ids == plain(text).input_ids and own.all_special_tokens == plain.all_special_tokens
    assert own.added_tokens_encoder.keys() - plain.added_tokens_encoder.keys() == {"<new>"}
    rows = _first_rows(torch.randn(4, 3), (2, 4), 6, torch.float32)
    assert rows.isfinite().all(), "4 is known to the tokenizer, and the table ends before it"


def test_killed_and_resumed_it_goes_on_to_the_bit():
    whole, first, resumed = new_trainer(), new_trainer(), new_trainer()
    steps, metrics = list(whole), iter(first)
    next(metrics), next(metrics)
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    assert sum(p.numel() for name, p in trained_weights(whole.model)) == 3 * 64


@pytest.mark.parametrize("model_type", MODELS)
def test_rows_of_a_batch_have_their_own_tokens_and_the_base_none(model_type, tmp_path):
    model = build_tiny(model_type)
    save_adapter(adapted(model_type, NEW), tmp_path / "new")
    save_adapter(adapted(model_type), tmp_path / "old")
    adapters = {name: read_adapter(model, tmp_path / name) for name in ("new", "old")}
    expected = {name: logits(load_adapter(build_tiny(model_type), tmp_path / name)) for name in adapters}
    expected[None] = logits(build_tiny(model_type))
    before = weights_before(model, adapters["new"])
    assert torch.equal(logits(attach_adapter(model, adapters["new"])), expected["new"])
    assert torch.equal(logits(detach_adapter(model, before)), expected[None])
    switch = add_switch(model, adapters)
    for rows in (("new", "old"), (None, "new"), ("old", None)):
        switch.use_rows(rows)
        found = logits(model)
        for i, name in enumerate(rows):
            width = expected[name].shape[-1]
            assert torch.allclose(found[i, :, :width], expected[name][i], atol=2e-4)
            assert found.shape[-1] == 162 and (name is not None or found[i].isfinite().all())


def test_what_a_model_cannot_have_is_refused():
    with pytest.raises(ModelError, match="trained whole"):
        method(also=(EMBEDDINGS,)).apply(build_tiny("llama"))


@pytest.mark.parametrize("indices", [[1, 1], [-1], ["a"], {"up_proj": [3]}, {"embed_tokens": [2, 3]}])
def test_tokens_that_the_file_does_not_have_are_refused(indices, tmp_path):
    import json

    save_adapter(adapted("llama"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": indices}))
    with pytest.raises(ModelError, match="token"):
        read_adapter(build_tiny("llama"), tmp_path)
