"""Bottleneck adapters equal their formula in float64, and are planned, trained, resumed, saved and used."""

import json
from dataclasses import replace

import pytest
import torch
from methods import assert_as_planned, of_text, plan
from safetensors.torch import load_file, save_file
from test_layer import BASES, IN, make_base, random_input
from test_layer import check_against_formula as check_against
from tiny import build_tiny, quantized_pair
from tiny_files import write_recipe
from tiny_runs import logits

from qlora_lite.adapters.bottleneck import LEAVES, Bottleneck, BottleneckLinear, bottleneck_layers
from qlora_lite.adapters.files import Lora, begin_with, load_adapter, save_adapter
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.read import WEIGHTS_NAME, named_base, read_adapter
from qlora_lite.errors import ModelError, RecipeError
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.skeleton import meta_model
from qlora_lite.quant.linear import frozen_weight
from qlora_lite.quant.product import materialize
from qlora_lite.recipe.load import load_recipe

WIDTH = 6
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "silu": lambda z: z * torch.sigmoid(z),
}


def randomised(layer, seed=1):
    with torch.no_grad():
        for number, leaf in enumerate(LEAVES):
            generator = torch.Generator().manual_seed(seed + number)
            layer.get_parameter(leaf).normal_(generator=generator).mul_(0.3)
    return layer


def formula(layer, x):
    """The module's equation in float64, with leaves for every gradient."""
    weight = materialize(*frozen_weight(layer.base), torch.float32).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, *map(layer.get_parameter, LEAVES))]
    x, down, down_bias, up, up_bias = leaves
    h = x @ weight.t()
    h = h if layer.base.bias is None else h + layer.base.bias.double()
    return h + ACTIVATIONS[layer.activation](h @ down.t() + down_bias) @ up.t() + up_bias, leaves


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_equals_the_float64_formula(kind, activation):
    layer = randomised(BottleneckLinear(make_base(kind), WIDTH, activation, torch.float32))
    check_against(layer, random_input(2, 9, IN), 1e-5, formula)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_rounds_as_bf16_does(dtype):
    layer = randomised(BottleneckLinear(make_base("nf4", dtype=torch.bfloat16), WIDTH, "gelu", dtype))
    check_against(layer, random_input(2, 30, IN, dtype=torch.bfloat16), 4e-2, formula)


def test_a_new_one_gives_what_the_base_gives_to_the_bit():
    model, _ = quantized_pair("llama")
    before = logits(model)
    Bottleneck(WIDTH, "houlsby").apply(model)
    assert torch.equal(logits(model), before) and Bottleneck().does_nothing(model)
    for _, layer in bottleneck_layers(model):
        randomised(layer)
        assert layer.down_weight.shape == (WIDTH, layer.base.out_features)
    assert not torch.equal(logits(model), before) and not Bottleneck().does_nothing(model)


PLACES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
}


@pytest.mark.parametrize("family", PLACES)
def test_they_stand_behind_the_parts_of_each_block(family):
    for placement, kept in (("pfeiffer", slice(1, 2)), ("houlsby", slice(0, 2))):
        model = build_tiny(family)
        Bottleneck(WIDTH, placement).apply(model)
        paths = [path for path, _ in bottleneck_layers(model)]
        assert len(paths) == 2 * len(PLACES[family][kept])
        assert {tuple(path.split(".")[-2:]) for path in paths} <= {
            tuple(f"0.{place}".split(".")[-2:]) for place in PLACES[family][kept]
        } | {(str(block), "fc2") for block in range(2)}


@pytest.mark.parametrize("family", ["qwen3_moe", "mamba", "deepseek_v3"])
def test_a_family_without_a_place_for_them_is_refused_and_left_as_it_is(family):
    model = build_tiny(family)
    with pytest.raises(ModelError, match=r"has no place in .*; take adapter.method lora"):
        Bottleneck().apply(model)
    assert not any(bottleneck_layers(model))


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_it_is_planned_and_holds_to_the_plan(placement):
    case = of_text(method=Bottleneck(WIDTH, placement, dtype=torch.float32))
    assert_as_planned(case, plan(case, 2**40))


def test_memory_options_change_rounding_alone():
    case = of_text(method=Bottleneck(WIDTH, "houlsby", dtype=torch.float32))
    losses = [
        [step.loss for step in case.trainer(options)]
        for options in (
            MemoryOptions(),
            MemoryOptions("none"),
            MemoryOptions(layers_per_checkpoint=2),
            MemoryOptions(tile_tokens=5, cache_dequantized=True),
        )
    ]
    assert losses[0][0] > losses[0][-1] and losses[0] == losses[1] == losses[2]
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch compiles its own so
def test_a_layer_is_compiled_as_one_graph():
    layer = randomised(BottleneckLinear(make_base("nf4"), WIDTH, "gelu", torch.float32))
    x = random_input(2, 9, IN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_a_plan_sees_that_its_blocks_are_alike():
    config = build_tiny("llama", num_hidden_layers=6).config
    case = of_text(method=Bottleneck(WIDTH))
    work = replace(case.workload, spec=replace(case.workload.spec, config=config))
    assert work.spec.pattern(work.method) == (0, 1)


def saved(folder, seed=1, family="llama", **settings):
    """Write an adapter of a 4-bit tiny model; return its method, and the model's logits with it."""
    model, _ = quantized_pair(family)
    method = Bottleneck(**{"width": WIDTH, "dtype": torch.float32} | settings)
    method.apply(model)
    for _, layer in bottleneck_layers(model):
        randomised(layer, seed)
    save_adapter(model, folder, "base", method=method)
    return method, logits(model)


def skeleton():
    return meta_model(build_tiny("llama").config, "nf4", True, torch.float32)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_a_folder_is_read_checked_and_attached(tmp_path, placement):
    method, expected = saved(tmp_path / "a", placement=placement, activation="silu")
    read = read_adapter(skeleton(), tmp_path / "a")
    assert read.method == method and named_base(tmp_path / "a") == ("base", None)
    assert read.nbytes == sum(each.nbytes for each in load_file(tmp_path / "a" / WEIGHTS_NAME).values())
    model = load_adapter(quantized_pair("llama")[0], tmp_path / "a")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ModelError, match="already"):
        load_adapter(model, tmp_path / "a")
    lora = quantized_pair("llama")[0]
    Lora().apply(lora)
    with pytest.raises(ModelError, match="of another method, Bottleneck"):
        begin_with(lora, read)


def test_it_lies_where_the_model_computes_and_not_where_a_weight_waits(tmp_path):
    saved(tmp_path / "a")
    model = build_tiny("llama")
    model.model.layers[0].mlp.down_proj.to("meta")
    load_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    assert len(tensors) == 2 * len(LEAVES)
    for path, layer in bottleneck_layers(model):
        assert all(torch.equal(layer.get_parameter(leaf), tensors[f"{path}.{leaf}"]) for leaf in LEAVES)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.popitem(), "is missing"),
        (lambda t: t.update(more=torch.ones(2)), "more belongs to no layer"),
        (lambda t: t.update({next(iter(t)): torch.ones(3)}), r"torch.float32 \(3,\)"),
        (lambda t: next(iter(t.values())).fill_(torch.nan), "is not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, spoil, words):
    saved(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    spoil(tensors)
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    with pytest.raises(ModelError, match=f"does not fit this model: .*{words}"):
        read_adapter(skeleton(), tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", 0),
        ("width", "6"),
        ("placement", "both"),
        ("activation", []),
        ("dtype", "int8"),
        ("peft_type", "IA3"),
        ("peft_type", []),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(tmp_path, key, value):
    saved(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=key):
        read_adapter(skeleton(), tmp_path / "a")


@torch.no_grad()
def test_rows_of_several_adapters_are_each_as_alone(tmp_path):
    alone = {"houlsby": saved(tmp_path / "houlsby", placement="houlsby")[1], "other": saved(tmp_path / "other", 9)[1]}
    model, _ = quantized_pair("llama")
    alone[None] = logits(model)
    Lora(rank=4, dtype=torch.float32).apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    save_adapter(model, tmp_path / "lora", "base")
    alone["lora"] = logits(model)
    switched, _ = quantized_pair("llama")
    names = ["houlsby", "lora", "other"]
    switch = add_switch(switched, {name: read_adapter(switched, tmp_path / name) for name in names})
    for name in (*names, None):
        with switch.using(name):
            assert torch.allclose(logits(switched), alone[name], atol=1e-4)
    for rows in (("houlsby", None), ("lora", "other"), ("other", "houlsby")):
        switch.use_rows(rows)
        found = logits(switched)
        for row, name in enumerate(rows):
            assert torch.allclose(found[row], alone[name][row], atol=1e-4), (rows, name)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_rows_whose_tokens_an_architecture_joins_are_each_as_alone(tmp_path, placement):
    alone = {"own": saved(tmp_path, family="opt", placement=placement)[1], None: logits(quantized_pair("opt")[0])}
    model, _ = quantized_pair("opt")
    switch = add_switch(model, {"own": read_adapter(model, tmp_path)})
    for rows in ((None, "own"), ("own", None)):
        switch.use_rows(rows)
        found = logits(model)
        assert all(torch.allclose(found[row], alone[name][row], atol=1e-4) for row, name in enumerate(rows))


def test_settings_of_the_other_method_are_refused(tmp_path):
    path = write_recipe(tmp_path, tmp_path)
    with pytest.raises(RecipeError) as found:
        load_recipe(path, ["adapter.method=bottleneck", "model.path=x"], check_files=False)
    assert {problem.key for problem in found.value.problems} == {"lora.rank", "lora.alpha"}
    with pytest.raises(RecipeError, match=r"bottleneck.width: only with adapter.method bottleneck"):
        load_recipe(path, ["bottleneck.width=8"], check_files=False)
