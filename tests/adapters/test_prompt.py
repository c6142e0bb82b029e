"""Prompt tuning and p-tuning: as in peft, packed as alone, planned, resumed and saved like any method."""

import json
import warnings

import pytest
import torch
from methods import ledger_of, of_text, plan
from safetensors.torch import load_file
from tiny import quantized_pair
from tiny_files import byte_tokenizer, write_recipe
from tiny_runs import logits
from tiny_trainer import examples
from torch.nn import functional

from qlora_lite.adapters.files import load_adapter, save_adapter
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.prompt import PromptTuning, count_virtual, virtual_tokens
from qlora_lite.adapters.read import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from qlora_lite.data.storage import virtual_ids
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.inference.generate import answers
from qlora_lite.inference.multi_adapter import Task, Tasks
from qlora_lite.recipe.load import load_recipe
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.state import STATE, capture, restore

METHODS = {"prompt tuning": PromptTuning(5), "p-tuning": PromptTuning(3, encoder_width=16)}


@pytest.fixture(params=METHODS)
def case(request):
    found = of_text(method=METHODS[request.param])
    object.__setattr__(found, "changes", {"max_tokens": 32})
    return found


def tuned(method=METHODS["prompt tuning"], model_type="llama", **changes):
    """A tiny model with virtual tokens, in NF4, and the same one in plain transformers with the dequantised weights."""
    torch.manual_seed(0)
    model, plain = quantized_pair(model_type, **changes)
    method.apply(model)
    return model, plain


def with_virtual_ids(ids, count):
    """Rows of token ids [rows, T] behind virtual tokens."""
    return torch.cat([torch.tensor(virtual_ids(count), dtype=torch.int64).expand(len(ids), -1), ids], 1)


def row_by_row(plain, part, rows):
    """The sum of the losses of rows, each with the embeddings of the virtual tokens before it, by plain torch."""
    table, total = plain.get_input_embeddings(), 0
    for row in rows:
        ids = torch.from_numpy(row.token_ids).long()
        own = part()
        logits = plain(inputs_embeds=torch.cat([own, table(ids)])[None]).logits[0, len(own) :]
        learned = torch.from_numpy(row.learned)[1:]
        total = total + functional.cross_entropy(logits[:-1][learned], ids[1:][learned], reduction="sum")
    return total


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(method, model_type):
    model, plain = tuned(method, model_type)
    plain.requires_grad_(False)
    part, rows = virtual_tokens(model), examples(3)
    work = of_text(method=method).workload
    loss = work.loss(model, work.inputs(work.collate(rows), torch.device("cpu"))).sum
    loss.backward()
    found = [parameter.grad.clone() for parameter in part.parameters()]
    part.zero_grad()
    expected = row_by_row(plain, part, rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for gradient, parameter in zip(found, part.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item())


def test_it_begins_with_the_embeddings_of_the_tokens_given_and_else_of_some_drawn():
    model, _ = tuned(PromptTuning(5, (7, 9)))
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(virtual_tokens(model)(), table[[7, 9, 7, 9, 7]].float())
    drawn, _ = tuned(PromptTuning(5))
    assert all((row == table).all(1).any() for row in virtual_tokens(drawn)())


def test_it_holds_to_its_plan(case):
    fastest, least = plan(case, 2**40)
    for candidate in (fastest, least):
        trainer = case.trainer(candidate.options)
        assert ledger_of(trainer).peak.total == pytest.approx(candidate.prediction.simulation.peak().total, rel=0.01)


def test_it_learns_and_goes_on_to_the_bit(case, tmp_path):
    whole = case.trainer()
    before = whole.evaluate(case.examples).loss
    steps = list(whole)
    assert whole.evaluate(case.examples).loss < before
    first = case.trainer()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, state = capture(first)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(first.step, tensors, {STATE: state}), {}, "")
    torch.manual_seed(1)
    resumed = case.trainer()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_peft_computes_the_same_with_the_saved_adapter(method, tmp_path):
    peft = pytest.importorskip("peft")
    model, plain = tuned(method)
    save_adapter(model, tmp_path / "adapter", "base", method=method)
    assert json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())["num_virtual_tokens"] == method.virtual_tokens
    assert list(load_file(tmp_path / "adapter" / WEIGHTS_NAME)) == ["prompt_embeddings"]
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = logits(model.eval(), with_virtual_ids(ids, count_virtual(model)))
        torch.testing.assert_close(ours, other(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_answers_are_those_of_the_whole_row_computed_again_for_each_token():
    model, plain = tuned(vocab_size=300)
    tokenizer, part, prompts = byte_tokenizer(), virtual_tokens(model), ["one two", "three"]
    part.embeddings.mul_(20)
    found = answers(model, tokenizer, prompts, 5)
    for prompt, said in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        for _ in range(5):
            rows = torch.cat([part(), plain.get_input_embeddings()(torch.tensor(ids))])[None]
            ids.append(int(plain(inputs_embeds=rows).logits[0, -1].argmax()))
        assert said.text == tokenizer.decode(ids[-5:], skip_special_tokens=True)


def test_a_model_takes_virtual_tokens_once_and_only_where_embeddings_are_all():
    model, _ = tuned()
    with pytest.raises(ModelError, match="has virtual tokens already"):
        METHODS["prompt tuning"].apply(model)


@torch.no_grad()
def test_adapters_with_and_without_virtual_tokens_share_a_model_and_no_batch(tmp_path):
    alone, ids = {}, torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    for name, count in (("short", 2), ("long", 5)):
        model, _ = tuned(PromptTuning(count))
        save_adapter(model, tmp_path / name, "base", method=PromptTuning(count))
        alone[name] = logits(model, with_virtual_ids(ids, count))
    model, _ = quantized_pair("llama")
    alone[None] = logits(model, ids)
    switch = add_switch(model, {name: read_adapter(model, tmp_path / name) for name in ("short", "long")})
    for name, expected in alone.items():
        with switch.using(name):
            assert torch.equal(logits(model, with_virtual_ids(ids, count_virtual(model))), expected)
    tasks = Tasks(model, None, switch, {"short": Task(None, None, (), 0), "long": Task(None, None, (), 0)})
    with pytest.raises(ModelError, match="shares no batch with another one"):
        tasks.answer(["short", None], [[], []], 4)


def test_what_peft_wrote_is_read_and_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    _, plain = tuned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft asks it for
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        theirs = peft.get_peft_model(plain, config).eval()
        theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(quantized_pair("llama")[0], tmp_path / "adapter")
    ids = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(logits(model, with_virtual_ids(ids, 4))[:, 4:], expected[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_prompt_that_leaves_no_room_and_settings_of_others_are_refused(tmp_path):
    path = write_recipe(tmp_path, tmp_path, lora={}, adapter={"method": "prompt"})
    with pytest.raises(RecipeError, match=r"prompt.virtual_tokens = 60: leaves 4 of data.max_tokens 64 for a row"):
        load_recipe(path, ["prompt.virtual_tokens=60", "data.max_tokens=64", "model.path=x"], check_files=False)
    with pytest.raises(RecipeError, match=r"lora.rank: only with adapter.method lora or dora"):
        load_recipe(path, ["lora.rank=2", "model.path=x"], check_files=False)
    with pytest.raises(RecipeError, match="write a number there, such as 3e-2"):
        load_recipe(path, ["train.learning_rate=auto", "model.path=x"], check_files=False)
