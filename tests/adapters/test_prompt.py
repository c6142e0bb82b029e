"""Prompt tuning and p-tuning: as in peft, packed as alone, planned, resumed and saved like any method."""

import json

import pytest
import torch
from methods import assert_as_planned, of_text, plan
from safetensors.torch import load_file
from tiny import build_tiny, quantized_pair, random_factors
from tiny_files import byte_tokenizer, write_recipe
from tiny_runs import logits
from tiny_trainer import examples
from torch.nn import functional
from transformers import DynamicCache

from qlora_lite.adapters.files import Lora, load_adapter, save_adapter
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.prefix import PrefixTuning, prefix_layers
from qlora_lite.adapters.prompt import PromptTuning, count_virtual, virtual_tokens
from qlora_lite.adapters.read import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from qlora_lite.data.tokens.storage import virtual_ids
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.inference.generate import answers
from qlora_lite.inference.multi_adapter import Task, Tasks
from qlora_lite.recipe.load import load_recipe
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.state import STATE, capture, restore

OF_TRANSFORMERS = "ignore:.*(is_gradient_checkpointing|past_key_values).*:FutureWarning"  # about what peft asks it for
METHODS = {
    "prompt tuning": PromptTuning(5),
    "p-tuning": PromptTuning(3, encoder_width=16),
    "prefix tuning": PrefixTuning(4),
}
PROMPTS = {name: METHODS[name] for name in ("prompt tuning", "p-tuning")}


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
    for _, layer in prefix_layers(model):
        layer.prefix.data.normal_()
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
        is_target = torch.from_numpy(row.is_target)[1:]
        total = total + functional.cross_entropy(logits[:-1][is_target], ids[1:][is_target], reduction="sum")
    return total


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "opt"])
@pytest.mark.parametrize("method", PROMPTS.values(), ids=PROMPTS)
def test_packed_rows_have_the_loss_and_gradients_of_trains_unpacked(method, model_type):
    model, plain = tuned(method, model_type)
    plain.requires_grad_(False)
    part, rows = virtual_tokens(model), examples(3)
    work = of_text(method=method).workload
    loss = work.loss(model, work.batches.inputs(work.batches.collate(rows), torch.device("cpu"))).sum
    loss.backward()
    found = [parameter.grad.clone() for parameter in part.parameters()]
    part.zero_grad()
    expected = row_by_row(plain, part, rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for gradient, parameter in zip(found, part.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_forward_of_the_whole_model_embeds_virtual_tokens_once(model_type):
    """OPT's calls its decoder past the model that has them."""
    model, plain = tuned(model_type=model_type)
    ids = torch.randint(5, 60, (2, 7))
    own = virtual_tokens(model)().detach().expand(2, -1, -1)
    with torch.no_grad():
        expected = plain(inputs_embeds=torch.cat([own, plain.get_input_embeddings()(ids)], 1)).logits
        found = model(input_ids=with_virtual_ids(ids, 5)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(OF_TRANSFORMERS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_packed_rows_with_a_prefix_have_the_loss_and_gradients_of_trains_unpacked_with_a_cache(model_type):
    model, plain = tuned(METHODS["prefix tuning"], model_type)
    rows, layers = examples(3), [layer for _, layer in prefix_layers(model)]
    work = of_text(method=METHODS["prefix tuning"]).workload
    loss = work.loss(model, work.batches.inputs(work.batches.collate(rows), torch.device("cpu"))).sum
    loss.backward()
    found = [layer.prefix.grad.clone() for layer in layers]
    size, config = plain.config.hidden_size // plain.config.num_attention_heads, plain.config
    positions, expected = torch.arange(4)[None], 0
    cos, sin = plain.model.rotary_emb(torch.zeros(1, 4, 1), positions)
    begun = [layer.prefix.detach().clone().requires_grad_() for layer in layers]
    for row in rows:
        cache = DynamicCache(config=config)
        for number in range(config.num_hidden_layers):
            key, value = (begun[2 * number + n].view(4, -1, size).transpose(0, 1)[None] for n in (0, 1))
            turned = torch.cat([-key[..., size // 2 :], key[..., : size // 2]], -1)
            cache.update(key * cos[:, None] + turned * sin[:, None], value, number)
        ids = torch.from_numpy(row.token_ids).long()[None]
        logits = plain(
            input_ids=ids, past_key_values=cache, position_ids=torch.arange(4, 4 + ids.shape[1])[None]
        ).logits
        is_target = torch.from_numpy(row.is_target)[1:]
        expected = expected + functional.cross_entropy(
            logits[0, :-1][is_target], ids[0, 1:][is_target], reduction="sum"
        )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for gradient, prefix in zip(found, begun, strict=True):
        torch.testing.assert_close(gradient, prefix.grad, rtol=1e-4, atol=1e-5 * prefix.grad.abs().max().item())


def test_it_begins_with_the_embeddings_of_the_tokens_given_and_else_of_some_drawn():
    model, _ = tuned(PromptTuning(5, (7, 9)))
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(virtual_tokens(model)(), table[[7, 9, 7, 9, 7]].float())
    drawn, _ = tuned(PromptTuning(5))
    assert all((row == table).all(1).any() for row in virtual_tokens(drawn)())


@torch.no_grad()
@pytest.mark.parametrize(("ids", "first"), [((7, 9), [7, 9, 7, 9]), ((), None)])
def test_a_prefix_begins_as_what_its_tokens_do_in_the_model(ids, first):
    model, plain = tuned(method := PrefixTuning(4, ids))
    first = first or virtual_tokens(model).first.tolist()
    method.begin(model)
    rows = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = plain(input_ids=torch.cat([torch.tensor(first).expand(2, -1), rows], 1)).logits[:, 4:]
    torch.testing.assert_close(logits(model, with_virtual_ids(rows, 4))[:, 4:], expected, rtol=1e-4, atol=1e-5)


def test_it_holds_to_its_plan(case):
    assert_as_planned(case, plan(case, 2**40))


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


@pytest.mark.filterwarnings(OF_TRANSFORMERS)
@pytest.mark.parametrize(("name", "model_type"), [*((name, "llama") for name in METHODS), ("prefix tuning", "gpt_oss")])
def test_peft_computes_the_same_with_the_saved_adapter(name, model_type, tmp_path):
    peft = pytest.importorskip("peft")
    method = METHODS[name]
    model, plain = tuned(method, model_type)
    save_adapter(model, tmp_path / "adapter", "base", method=method)
    assert json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())["num_virtual_tokens"] == method.virtual_tokens
    assert list(load_file(tmp_path / "adapter" / WEIGHTS_NAME)) == ["prompt_embeddings"]
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = logits(model.eval(), with_virtual_ids(ids, count_virtual(model)))
        theirs = other(input_ids=ids).logits  # of prefix tuning, without those of virtual tokens
        torch.testing.assert_close(ours[:, -theirs.shape[1] :], theirs, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "phi3", "cohere", "smollm3"])
def test_a_prefix_is_refused_where_keys_are_not_its_own(model_type):
    with pytest.raises(ModelError, match=r"adapter.method prefix is for models with layers k_proj and v_proj"):
        tuned(METHODS["prefix tuning"], model_type)


@pytest.mark.parametrize("model_type", ["mamba", "opt_narrow"])
def test_peft_s_configuration_is_of_the_embeddings_whatever_the_blocks_are(model_type):
    model = build_tiny("opt", word_embed_proj_dim=16) if model_type == "opt_narrow" else build_tiny(model_type)
    method = METHODS["prompt tuning"]
    method.apply(model)
    config, (tensor,) = method.config(model, "base"), method.files(model).values()
    assert (config["num_virtual_tokens"], config["token_dim"]) == tuple(tensor.shape)
    assert config["num_attention_heads"] >= 1


def test_a_model_takes_virtual_tokens_once_and_only_where_embeddings_are_all():
    model, _ = tuned()
    with pytest.raises(ModelError, match="has virtual tokens already"):
        METHODS["prompt tuning"].apply(model)


@torch.no_grad()
def test_prefixes_share_a_model_with_adapters_of_the_layers_that_they_stand_behind(tmp_path):
    alone, ids = {}, torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    lora, _ = quantized_pair("llama")
    Lora(rank=4, dtype=torch.float32, also=("norms",)).apply(lora)
    random_factors(lora)
    save_adapter(lora, tmp_path / "lora", "base")
    alone["lora"] = logits(lora, ids)
    for count in (3, 5):
        model, _ = tuned(method := PrefixTuning(count))
        save_adapter(model, tmp_path / f"prefix {count}", "base", method=method)
        alone[f"prefix {count}"] = logits(model, with_virtual_ids(ids, count))
    model, _ = quantized_pair("llama")
    alone[None] = logits(model, ids)
    switch = add_switch(model, {name: read_adapter(model, tmp_path / name) for name in alone if name})
    for name, expected in (*alone.items(), ("lora", alone["lora"])):
        with switch.using(name):
            found = logits(model, with_virtual_ids(ids, count_virtual(model)))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    switch.use_rows(["lora", None])
    both = logits(model, ids)
    torch.testing.assert_close(both, torch.stack([alone["lora"][0], alone[None][1]]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_with_and_without_virtual_tokens_share_a_model_and_no_batch(tmp_path):
    alone, ids = {}, torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    for name, method in (("short", PromptTuning(2)), ("long", PromptTuning(5)), ("prefix", PrefixTuning(3))):
        model, _ = tuned(method)
        save_adapter(model, tmp_path / name, "base", method=method)
        alone[name] = logits(model, with_virtual_ids(ids, method.virtual_tokens))
    model, _ = quantized_pair("llama")
    alone[None] = logits(model, ids)
    switch = add_switch(model, {name: read_adapter(model, tmp_path / name) for name in alone if name})
    for name, expected in alone.items():
        with switch.using(name):
            found = logits(model, with_virtual_ids(ids, count_virtual(model)))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tasks = Tasks(model, None, switch, {"short": Task(None, None, (), 0), "long": Task(None, None, (), 0)})
    with pytest.raises(ModelError, match="shares no batch with another one"):
        tasks.answer(["short", None], [[], []], 4)


@pytest.mark.filterwarnings(OF_TRANSFORMERS)
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_what_peft_wrote_is_read_and_computes_the_same(tmp_path, kind):
    peft = pytest.importorskip("peft")
    _, plain = quantized_pair("llama")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(quantized_pair("llama")[0], tmp_path / "adapter")
    ids = torch.randint(3, 160, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    found = logits(model, with_virtual_ids(ids, 4))[:, 4:]
    torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=1e-4, atol=1e-5)


def test_a_prompt_that_leaves_no_room_and_settings_of_others_are_refused(tmp_path):
    path = write_recipe(tmp_path, tmp_path, lora={}, adapter={"method": "prompt"})
    with pytest.raises(RecipeError, match=r"prompt.virtual_tokens = 60: leaves 4 of data.max_tokens 64 for a row"):
        load_recipe(path, ["prompt.virtual_tokens=60", "data.max_tokens=64", "model.path=x"], check_files=False)
    with pytest.raises(RecipeError, match=r"lora.rank: only with adapter.method dora or lora"):
        load_recipe(path, ["lora.rank=2", "model.path=x"], check_files=False)
    with pytest.raises(RecipeError, match="write a number there, such as 2e-2"):
        load_recipe(path, ["train.learning_rate=auto", "model.path=x"], check_files=False)
