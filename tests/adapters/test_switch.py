"""Every row of a batch is computed as if its adapter were the only one."""

import copy

import pytest
import torch
from tiny import ReferenceLora, build_tiny, quantized_pair

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.adapters.lora.inject import linear_layers, lora_layers
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.read import Adapter, Factors
from qlora_lite.errors import ModelError
from qlora_lite.quant.linear import frozen_weight

IDS = torch.randint(3, 160, (5, 11), generator=torch.Generator().manual_seed(0))
ROWS = ("one", None, "two", "one", "three")


def random_adapter(model, seed, rank, chosen=lambda name: True, rslora=False) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in linear_layers(model).items():
        out_features, in_features = frozen_weight(layer)[0].shape
        pair = torch.randn(rank, in_features, generator=generator), torch.randn(out_features, rank, generator=generator)
        layers[name] = Factors(0.1 * pair[0], 0.1 * pair[1], 2.0 * rank, rslora)
    return Adapter({name: factors for name, factors in layers.items() if chosen(name)}, 0.0)


def adapters_of(model):
    return {
        "one": random_adapter(model, 1, 4),
        "two": random_adapter(model, 2, 2, lambda name: name.endswith(("q_proj", "up_proj", "c_attn", "fc2"))),
        "three": random_adapter(model, 3, 3, rslora=True),
    }


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def alone(model, adapter):
    """Return the model that was trained, each layer computed by itself: several at once sum in another order."""
    if adapter is None:
        return model
    trained = attach_adapter(copy.deepcopy(model), adapter)
    for _, layer in lora_layers(trained):
        if layer.shared is not None:
            layer.shared.fall_apart()
    return trained


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_one_adapter_for_all_rows_is_the_trained_layer_to_the_bit(model_type):
    model, _ = quantized_pair(model_type)
    adapters, plain = adapters_of(model), copy.deepcopy(model)
    switch = add_switch(model, adapters)
    for name in ("one", "two", "three", None, "one"):
        switch.use(name)
        expected = logits(alone(plain, adapters.get(name)))
        assert torch.equal(logits(model), expected), name
        switch.use_rows([name] * len(IDS))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "phi3", "opt", "qwen3_next"])
def test_rows_with_different_adapters_are_each_what_they_are_alone(model_type):
    model, plain = quantized_pair(model_type)
    adapters = adapters_of(plain)
    switch = add_switch(model, adapters)
    switch.use_rows(ROWS)
    together = logits(model)
    for row, name in enumerate(ROWS):
        reference = copy.deepcopy(plain)
        for path, f in (adapters[name].layers if name else {}).items():
            wrapped = ReferenceLora(reference.get_submodule(path), f.lora_A, f.lora_B, f.scale)
            reference.set_submodule(path, wrapped)
        expected = logits(reference, IDS[row : row + 1])[0]
        assert torch.allclose(together[row], expected, atol=2e-4), name
        assert not torch.allclose(together[row], logits(plain, IDS[row : row + 1])[0], atol=1e-2) or name is None


def test_a_swap_moves_no_weight_and_a_block_gives_the_earlier_choice_back():
    model = build_tiny("llama")
    switch = add_switch(model, adapters_of(model))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    switch.use("one")
    with switch.using("two"):
        assert switch.rows == "two"
    assert switch.rows == "one"
    with pytest.raises(RuntimeError), switch.using(None):
        raise RuntimeError
    assert switch.rows == "one"
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert not list(lora_layers(model))


def test_names_that_are_not_there_and_rows_that_do_not_fit_are_errors():
    model = build_tiny("llama")
    switch = add_switch(model, adapters_of(model))
    for choose in (lambda: switch.use("four"), lambda: switch.use_rows(["one", "four"])):
        with pytest.raises(ModelError, match="no adapter 'four'; there are one, two, three"):
            choose()
    for rows, count in ((["one", "two"], 5), (["one", "two"], 4)):
        switch.use_rows(rows)
        with pytest.raises(ModelError, match=f"2 rows have an adapter, the batch has {count}"):
            logits(model, IDS[:count])


def test_which_rows_use_an_adapter_is_found_once_for_all_layers_and_again_for_another_batch():
    model = build_tiny("llama")
    switch, device = add_switch(model, adapters_of(model)), torch.device("cpu")
    switch.use_rows(ROWS)
    logits(model)
    first = switch.places("one", device)
    logits(model)
    assert first.tolist() == [0, 3] and switch.places("one", device) is first
    switch.use_rows(ROWS[::-1])
    with switch.using(None):
        switch.use_rows(ROWS)
        assert switch.places("one", device).tolist() == [0, 3]
    assert switch.places("one", device).tolist() == [1, 4]
