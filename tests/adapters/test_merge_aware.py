"""LoRA layers that compute with the weights a merge will leave: values, gradients, ways to train and to use them."""

import re
from dataclasses import replace

import pytest
import torch
from test_layer import check_against_formula, make_layer, random_input
from tiny import build_tiny, quantized_pair
from tiny_files import write_recipe
from tiny_trainer import trainer

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.adapters.lora import inject
from qlora_lite.adapters.lora import switch as switch_of_layers
from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.adapters.lora.layer import merging_of
from qlora_lite.adapters.lora.switch import SwitchLinear, add_switch
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.models.load import adopt
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.models.quantizer import quantize_in_place
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.product import materialize
from qlora_lite.recipe.load import load_recipe
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.state import STATE, capture, restore

KINDS = ["nf4", "q4_0", "q8_0"]


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_the_merged_weight_and_gradients_those_of_lora_through_it(to, bias):
    chance = torch.Generator().manual_seed(0)
    offset = torch.randn(80, generator=chance) if bias else None
    layer = make_layer(QuantLinear.from_weight(torch.randn(80, 96, generator=chance), offset, "nf4", True))
    layer.lora_B.data.mul_(0.02)
    without = materialize(*layer.described, torch.float32)
    layer.merging = merging_of(layer.base, to, layer.scale, "a_proj")
    weight = materialize(*layer.described, torch.float32)
    assert not torch.equal(weight, without)

    def formula(layer, x):
        leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
        update = layer.scale * leaves[2] @ leaves[1]
        y = leaves[0] @ (weight.double() + update - update.detach()).t()
        return (y if offset is None else y + offset.double()), leaves

    check_against_formula(layer, random_input(3, 7, 96), 1e-6, formula)


@pytest.mark.parametrize("keep", [(), ("v_proj",)])
def test_layers_of_one_input_have_the_gradients_that_each_has_by_itself(keep):
    models = [build_tiny("llama") for _ in range(2)]
    for model in models:
        quantize_in_place(model, "nf4", True, keep)
        adopt(model)
        torch.manual_seed(0)
        add_lora(model, rank=4, alpha=8, merge_aware="nf4")
        for number, (_, layer) in enumerate(lora_layers(model)):
            layer.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    assert any(layer.shared for _, layer in lora_layers(models[0]))
    for _, layer in lora_layers(models[1]):
        layer.shared = None
    ids = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))
    losses = [model(input_ids=ids, labels=ids).loss for model in models]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (_, one), (_, other) in zip(lora_layers(models[0]), lora_layers(models[1]), strict=True):
        assert torch.allclose(one.lora_A.grad, other.lora_A.grad, rtol=1e-4, atol=1e-6)
        assert torch.allclose(one.lora_B.grad, other.lora_B.grad, rtol=1e-4, atol=1e-6)


OPTIONS = [
    MemoryOptions("none"),
    MemoryOptions(cache_dequantized=True),
    MemoryOptions(cache_merged=True),
    MemoryOptions(cache_merged=True, cache_dequantized=True, uncheckpointed_layers=1),
    pytest.param(MemoryOptions(layers_per_checkpoint=2), marks=pytest.mark.slow),
    MemoryOptions(offload_checkpoints=True, resident_layers=0),
    pytest.param(MemoryOptions(uncheckpointed_layers=1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_options_and_streaming_change_no_bit(options, to):
    plain = trainer(merge_aware=to)
    steps, other = list(plain), trainer(merge_aware=to, options=options)
    assert [step.loss for step in other] == [step.loss for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, plain.parameters, strict=True))
    assert [step.loss for step in trainer()] != [step.loss for step in steps]


def test_updates_in_backward_change_no_merged_weight_of_their_step():
    settings = dict(merge_aware="nf4", max_grad_norm=0, gradient_accumulation_steps=1, on_not_finite="stop")
    plain, other = (
        trainer(**settings, options=MemoryOptions(optimizer_in_backward=True, cache_merged=cached))
        for cached in (False, True)
    )
    assert [step.loss for step in plain] == [step.loss for step in other]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, plain.parameters, strict=True))


def test_merged_weights_are_kept_for_a_step_and_no_longer(monkeypatch):
    made = trainer(merge_aware="nf4", options=MemoryOptions(cache_merged=True))
    made_before, count = inject.merged, []
    monkeypatch.setattr(inject, "merged", lambda *args: count.append(1) or made_before(*args))
    monkeypatch.setattr("qlora_lite.adapters.lora.layer.merged", lambda *args: pytest.fail("merged for a product"))
    layers = [layer for _, layer in lora_layers(made.model)]
    for number, _ in enumerate(made, 1):
        assert len(count) == number * len(layers) and all(layer.merged is None for layer in layers)


def test_killed_and_resumed_it_goes_on_to_the_bit():
    settings = dict(merge_aware="nf4", optimizer="adamw_8bit", dtype=torch.bfloat16, rank=64)
    whole = trainer(**settings)
    steps = list(whole)
    first, resumed = trainer(**settings), trainer(**settings)
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def adapters_of(model, names="ab"):
    """Two adapters of all layers with random factors, of which the second adds its update beside the weight."""
    found = {}
    for number, name in enumerate(names):
        chance = torch.Generator().manual_seed(number)
        layers = {
            path: Factors(
                0.1 * torch.randn(4, layer.base.in_features, generator=chance),
                0.05 * torch.randn(layer.base.out_features, 4, generator=chance),
                8.0,
            )
            for path, layer in lora_layers(model)
        }
        found[name] = Adapter(layers, 0.0, merge_aware="nf4" if number == 0 else "off")
    return found


def test_rows_of_a_batch_that_use_several_adapters_have_each_its_own_weights():
    base = lambda: quantized_pair("llama")[0].eval()  # noqa: E731
    adapters = adapters_of(add_lora(base(), rank=1))
    ids = torch.randint(3, 160, (3, 11), generator=torch.Generator().manual_seed(0))
    alone = {name: attach_adapter(base(), adapter).eval() for name, adapter in adapters.items()} | {None: base()}
    model = base()
    switch = add_switch(model, adapters)
    switch.use_rows(["a", None, "b"])
    with torch.no_grad():
        found = model(input_ids=ids).logits
        for row, name in enumerate(["a", None, "b"]):
            assert torch.allclose(found[row], alone[name](input_ids=ids[row : row + 1]).logits[0], atol=1e-5)
        switch.use("a")
        assert torch.equal(model(input_ids=ids).logits, alone["a"](input_ids=ids).logits)
        assert not torch.allclose(
            found[0], attach_adapter(base(), adapters["b"])(input_ids=ids[:1]).logits[0], atol=1e-3
        )


@pytest.mark.parametrize("to", KINDS)
def test_the_adapter_that_all_rows_use_is_merged_in_place_once_and_the_base_comes_back(to, monkeypatch):
    base = lambda: quantized_pair("llama")[0].eval()  # noqa: E731
    adapters = {
        name: replace(adapter, merge_aware="off" if name == "b" else to)
        for name, adapter in adapters_of(add_lora(base(), rank=1), "abc").items()
    }
    ids = torch.randint(3, 160, (3, 11), generator=torch.Generator().manual_seed(0))
    models, count = [base(), base()], []
    switches = [add_switch(model, adapters, in_place=number > 0) for number, model in enumerate(models)]
    merged = switch_of_layers.merged
    monkeypatch.setattr(switch_of_layers, "merged", lambda *args: count.append(1) or merged(*args))
    layers = len([path for path, module in models[1].named_modules() if isinstance(module, SwitchLinear)])
    for rows, times in (("a", 1), ("a", 0), (None, 0), ("c", 1), ("b", 0), (["a", None, "b"], 0), ("c", 1)):
        logits = []
        for model, switch in zip(models, switches, strict=True):
            switch.use_rows(rows) if isinstance(rows, list) else switch.use(rows)
            count.clear()
            with torch.no_grad():
                logits.append(model(input_ids=ids).logits)
        assert torch.equal(*logits), rows
        assert len(count) == times * layers, rows
    with torch.no_grad():
        assert torch.equal(logits[1], attach_adapter(base(), adapters["c"])(input_ids=ids).logits)


def test_memory_that_runs_out_over_merging_in_place_leaves_the_layer_as_it_was(monkeypatch):
    model = quantized_pair("llama")[0].eval()
    adapters = {
        name: replace(adapter, merge_aware="nf4")
        for name, adapter in adapters_of(add_lora(quantized_pair("llama")[0], rank=1)).items()
    }
    switch, merged, count = add_switch(model, adapters, in_place=True), switch_of_layers.merged, []
    model.eval()
    ids = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))

    def merge(*arguments):
        count.append(1)
        if len(count) in (3, 20):
            raise torch.OutOfMemoryError
        return merged(*arguments)

    monkeypatch.setattr(switch_of_layers, "merged", merge)
    for name in ("a", "b"):
        switch.use(name)
        with torch.no_grad():
            with pytest.raises(torch.OutOfMemoryError):
                model(input_ids=ids)
            found = model(input_ids=ids).logits
            assert torch.equal(found, attach_adapter(quantized_pair("llama")[0], adapters[name])(input_ids=ids).logits)
    assert not any(layer.training for layer in model.modules())


def test_a_model_to_use_has_the_merged_weights_in_the_place_of_its_lora_layers():
    for to in KINDS:
        model = quantized_pair("llama")[0].eval()
        attach_adapter(model, replace(adapters_of(add_lora(quantized_pair("llama")[0], rank=1))["a"], merge_aware=to))
        ids = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = model.eval()(input_ids=ids).logits
            inject.put_merged_in_place(model)
            assert torch.equal(model(input_ids=ids).logits, before) and not list(lora_layers(model))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("adapter", "method", "dora"),
        ("lora", "dropout", "0.1"),
        ("lora", "start", "loftq"),
        ("train", "compile", "true"),
        ("model", "quant", "fp4"),
        ("model", "quant", "none"),
    ],
)
def test_what_cannot_be_trained_so_is_an_error_of_the_recipe(section, name, value, tmp_path):
    path = write_recipe(tmp_path, "model", train={"merge_aware": "nf4"})
    with pytest.raises(RecipeError, match=rf"{section}.{name} = .*: not possible with train.merge_aware nf4; write"):
        load_recipe(path, [f"{section}.{name}={value}"], check_files=False)


@pytest.mark.parametrize("to", KINDS)
def test_for_a_file_s_blocks_all_matrices_have_to_be_adapted_since_a_file_rounds_all_of_them(to):
    some, moe = quantized_pair("llama")[0], quantized_pair("mixtral")[0]
    if to == "nf4":
        assert add_lora(some, ["q_proj", "v_proj"], merge_aware=to) and add_lora(moe, merge_aware=to)
        return
    with pytest.raises(ModelError, match=r"10 would be trained as they are now, such as model\.layers\.0\.mlp\.down"):
        add_lora(some, ["q_proj", "v_proj"], merge_aware=to)
    with pytest.raises(ModelError, match=r"such as model\.layers\.0\.mlp\.experts\.\w+: adapt all"):
        add_lora(moe, merge_aware=to)


@pytest.mark.parametrize("to", KINDS)
def test_compiled_blocks_are_refused_in_python_too(to):
    """Their products would be those of the base alone."""
    model, _ = quantized_pair("llama")
    add_lora(model, rank=4, merge_aware=to)
    with pytest.raises(ModelError, match=r"leave out the updates that layers merge .*train\.merge_aware to off"):
        set_memory_options(model, MemoryOptions(compile=True))
    set_memory_options(model, MemoryOptions())
    with pytest.raises(ModelError, match=r"train\.compile would leave out"):
        trainer(merge_aware=to, options=MemoryOptions(compile=True))


@pytest.mark.parametrize(
    ("model_type", "options", "text"),
    [
        ("llama", {"dropout": 0.1}, "is for LoRA beside linear layers"),
        ("llama", {"dora": True}, "is for LoRA beside"),
        ("qwen3_moe", {"targets": ["experts"]}, "without dropout, DoRA or experts"),
        ("llama", {"merge_aware": "q5_0"}, "choose one of off, nf4, q4_0, q8_0"),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_refused_in_a_sentence(model_type, options, text):
    model, _ = quantized_pair(model_type)
    with pytest.raises(ModelError, match=re.escape(text)):
        add_lora(model, **({"merge_aware": "nf4"} | options))
    assert not any(lora_layers(model))


@pytest.mark.parametrize(
    ("quant", "to", "text"),
    [
        ("fp4", "nf4", "are in fp4"),
        ("none", "nf4", "are in 16 bit"),
        ("none", "q4_0", "rows of 98, no multiple of 32"),
    ],
)
def test_weights_of_another_format_or_size_are_refused(quant, to, text):
    model = build_tiny("llama", intermediate_size=98) if quant == "none" else quantized_pair("llama", quant)[0]
    with pytest.raises(ModelError, match=text):
        add_lora(model, merge_aware=to)
